"""Which of many engines gets a request: the one that has the longest prefix of it, if that is not too busy."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import reduce
from math import ceil
from operator import or_


class PrefixRouting:
    """Chooses engines by the prefixes that they should have in their caches, and by their loads.

    Engines are numbers.  The load of one is the number of its unfinished requests.  Engines come into question whose
    load exceeds that of the least loaded by at most the mean load, rounded up: of them those that have most of the
    prompt's leading blocks, of these the least loaded, and of several the next one in turn.  So a prefix that many
    requests share comes to as many engines as it takes, and then they share the load.

    What an engine has is not asked but remembered: the blocks of the prompts that it was given, as many as its cache
    holds.  Whoever has a block has those before it, because the blocks of a prompt are forgotten last to first.
    Sets of engines are ints with a bit for each, so that a choice among many takes a few operations.
    """

    def __init__(self) -> None:
        self._capacities: dict[int, int] = {}  # by engine, in blocks
        self._blocks: dict[int, OrderedDict[bytes, None]] = {}  # of each engine, the least recently used first
        self._holders: dict[bytes, int] = {}  # the engines that have a block
        self._loads: dict[int, int] = {}
        self._with_load: list[int] = [0]  # by load, the engines that have it
        self._total = 0  # of all loads
        self._next = 0  # the engine whose turn it is

    def join(self, engine: int, num_blocks: int) -> None:
        """An engine is there, with nothing to do and an empty cache of so many blocks."""
        self._capacities[engine], self._blocks[engine] = num_blocks, OrderedDict()
        self._loads[engine] = 0
        self._with_load[0] |= 1 << engine

    def leave(self, engine: int) -> None:
        """The engine is gone, and its cache with it."""
        self._forget(engine)
        self.set_load(engine, 0)
        self._with_load[0] ^= 1 << engine
        del self._capacities[engine], self._blocks[engine], self._loads[engine]

    def forget_prefixes(self) -> None:
        """The caches are empty."""
        for engine in self._blocks:
            self._forget(engine)

    def load(self, engine: int) -> int:
        return self._loads[engine]

    def set_load(self, engine: int, load: int) -> None:
        """The engine has so many unfinished requests."""
        before, self._loads[engine] = self._loads[engine], load
        self._total += load - before
        self._with_load += [0] * (load + 1 - len(self._with_load))
        self._with_load[before] ^= 1 << engine
        self._with_load[load] |= 1 << engine

    def route(self, hashes: Sequence[bytes], without: Iterable[int] = ()) -> int:
        """Choose the engine of a request, which is one more of its load from now on.

        Args:
            hashes: of the full blocks of its prompt, as `extend_hashes` makes them; none if no cache can serve it.
            without: engines that do not come into question; at least one must be left.
        """
        barred = reduce(or_, (1 << engine for engine in without), 0)
        loads = self._with_load
        least = next(load for load, some in enumerate(loads) if some & ~barred)
        most = least + ceil((self._total + 1) / len(self._loads))
        able = reduce(or_, loads[: most + 1]) & ~barred
        holders = self._holders
        # As many leading blocks as any of them has.
        count = bisect_left(range(len(hashes)), True, key=lambda index: not holders.get(hashes[index], 0) & able)
        if count:
            able &= holders[hashes[count - 1]]
        engine = self._in_turn(next(some & able for some in loads[least:] if some & able))
        self.set_load(engine, self._loads[engine] + 1)
        self._note(engine, hashes)
        return engine

    # -- the parts -------------------------------------------------------------------------------------------------

    def _in_turn(self, engines: int) -> int:
        later = engines >> self._next << self._next or engines
        engine = (later & -later).bit_length() - 1
        self._next = engine + 1
        return engine

    def _note(self, engine: int, hashes: Sequence[bytes]) -> None:
        """The engine will have these blocks."""
        blocks, holders, bit = self._blocks[engine], self._holders, 1 << engine
        for one in reversed(hashes):
            if one in blocks:
                blocks.move_to_end(one)
            else:
                blocks[one] = None
                holders[one] = holders.get(one, 0) | bit
        for _ in range(len(blocks) - self._capacities[engine]):
            self._drop(engine, blocks.popitem(last=False)[0])

    def _forget(self, engine: int) -> None:
        for one in self._blocks[engine]:
            self._drop(engine, one)
        self._blocks[engine].clear()

    def _drop(self, engine: int, block: bytes) -> None:
        left = self._holders[block] ^ 1 << engine
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]
