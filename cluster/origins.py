"""What the streams of a cluster are made of: kept by the directory, and told by the API processes that have them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any

from shoal.server.errors import EngineUnavailableError
from shoal.server.peers import Origin
from shoal.server.wire.responses import Cluster

MAX_BYTES = 64 * 2**20  # of all origins; the oldest give way


class Origins:
    """Origins by the ids of their streams, for as long as whoever has the stream is heard of, and a while after."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, Origin]] = {}  # with the replica that has the stream, the oldest first
        self._num_bytes = 0

    def put(self, replica: str, origin: Origin) -> None:
        self.drop([origin.identity.id])
        self._kept[origin.identity.id] = replica, origin
        self._num_bytes += origin.size
        while self._num_bytes > MAX_BYTES:
            self.drop([next(iter(self._kept))])

    def find(self, stream_id: str) -> Origin | None:
        _, origin = self._kept.get(stream_id, ("", None))
        return origin

    def drop(self, stream_ids: Iterable[str], replica: str | None = None) -> None:
        """Drop these, or those of them that this replica has."""
        for stream_id in stream_ids:
            owner, origin = self._kept.get(stream_id, ("", None))
            if origin is not None and replica in (None, owner):
                del self._kept[stream_id]
                self._num_bytes -= origin.size

    def expire(self, silence: Callable[[str], float]) -> None:
        """Drop what is over.

        Args:
            silence: for how many seconds nothing was heard of a replica.
        """
        kept = self._kept.items()
        self.drop([one for one, (replica, origin) in kept if silence(replica) > origin.keep_seconds])

    @property
    def all(self) -> list[Origin]:
        return [origin for _, origin in self._kept.values()]


class DirectoryPeers:
    """Implements `Peers` for an API process, over the directory.

    Args:
        replica: name of the API process.
        ask: calls a method of the directory; None if it does not answer.
    """

    def __init__(self, replica: str, ask: Callable[..., Awaitable[Any]]) -> None:
        self._replica = replica
        self._ask = ask
        self._own = Origins()
        self._untold: set[str] = set()  # ids of those that the directory did not take

    async def describe(self) -> Cluster | None:
        found: Cluster | None = await self._ask("describe")
        return found

    async def note(self, origin: Origin) -> None:
        self._own.put(self._replica, origin)
        await self._tell(origin)

    async def find(self, stream_id: str) -> Origin | None:
        found: list[Origin] | None = await self._ask("find_origin", stream_id)
        if found is None:
            raise EngineUnavailableError(
                "the cluster's directory does not answer, which knows streams; try again later"
            )
        return found[0] if found else None

    async def forget(self, stream_id: str) -> None:
        self._own.drop([stream_id])
        await self._ask("drop_origins", [stream_id])

    async def tend(self, held: Collection[str], *, is_known: bool) -> None:
        """Have the directory know what it should.

        Args:
            held: ids of the streams that the API process holds.
            is_known: whether the directory knew the API process; one that was started anew knows nobody.
        """
        gone = [origin.identity.id for origin in self._own.all if origin.identity.id not in held]
        self._untold.intersection_update(held)
        if gone:
            self._own.drop(gone)
            await self._ask("drop_origins", gone, self._replica)
        for origin in self._own.all:
            if not is_known or origin.identity.id in self._untold:
                await self._tell(origin)

    async def _tell(self, origin: Origin) -> None:
        self._untold.add(origin.identity.id)
        if await self._ask("keep_origin", self._replica, origin):
            self._untold.discard(origin.identity.id)
