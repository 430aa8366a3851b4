"""Simpler ways to choose an engine than by prefixes, which others use; for comparisons."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from random import Random

from shoal.scheduler.routing import PrefixRouting

NUM_POINTS = 64  # of an engine on the ring
NUM_FIRST = 4  # blocks of a prompt that say where on the ring it belongs


class LeastLoaded(PrefixRouting):
    """The engine with the fewest unfinished requests; of several the next one in turn."""

    def route(self, hashes: Sequence[bytes], without: Iterable[int] = ()) -> int:
        return super().route((), without)


class PowerOfTwo(LeastLoaded):
    """The less loaded of two engines that are drawn (Mitzenmacher 2001)."""

    def __init__(self) -> None:
        super().__init__()
        self._random = Random(0)
        self._engines: list[int] = []

    def join(self, engine: int, num_blocks: int) -> None:
        super().join(engine, num_blocks)
        self._engines.append(engine)

    def leave(self, engine: int) -> None:
        super().leave(engine)
        self._engines.remove(engine)

    def route(self, hashes: Sequence[bytes], without: Iterable[int] = ()) -> int:
        barred = frozenset(without)
        able = [engine for engine in self._engines if engine not in barred] if barred else self._engines
        engine = min(self._random.sample(able, min(2, len(able))), key=self.load)
        self.set_load(engine, self.load(engine) + 1)
        return engine


class ConsistentHash(LeastLoaded):
    """The engine whose point comes next on a ring, from where the prompt's first blocks are (Karger et al. 1997).

    A prompt without a full block goes to the least loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ring: list[tuple[bytes, int]] = []

    def join(self, engine: int, num_blocks: int) -> None:
        super().join(engine, num_blocks)
        for number in range(NUM_POINTS):
            insort(self._ring, (blake2b(b"%d %d" % (engine, number), digest_size=16).digest(), engine))

    def leave(self, engine: int) -> None:
        super().leave(engine)
        self._ring = [point for point in self._ring if point[1] != engine]

    def route(self, hashes: Sequence[bytes], without: Iterable[int] = ()) -> int:
        if not hashes:
            return super().route(hashes, without)
        barred, ring = frozenset(without), self._ring
        place = bisect_left(ring, (hashes[:NUM_FIRST][-1], -1))
        while (engine := ring[place % len(ring)][1]) in barred:
            place += 1
        self.set_load(engine, self.load(engine) + 1)
        return engine


ROUTINGS: dict[str, Callable[[], PrefixRouting]] = {
    "prefix": PrefixRouting,
    "load": LeastLoaded,
    "hash": ConsistentHash,
    "pow2": PowerOfTwo,
}
