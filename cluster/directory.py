"""Where everything in a cluster is: an actor that replicas tell, and that API processes ask."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from shoal.cluster.messages import Endpoint
from shoal.cluster.origins import Origins
from shoal.server.peers import Origin

LISTED_SECONDS = 5.0  # for which a replica is listed after it was heard of last
TELL_SECONDS = 1.0  # between two times that it tells where it is
WATCH_SECONDS = 10.0


class Directory:
    """What is there.  But for the secret it keeps nothing that its replicas would not tell it again within a second.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._engines: dict[str, tuple[float, Endpoint]] = {}
        self._servers: dict[str, tuple[float, str]] = {}
        self._heard_at: dict[str, float] = {}  # of API processes
        self._origins = Origins()
        self._secret = ""
        self._changed = asyncio.Event()
        self._number = 0  # of changes

    async def keep_secret(self, secret: str) -> str:
        """The secret that came first."""
        self._secret = self._secret or secret
        return self._secret

    async def tell_engine(self, replica: str, endpoint: Endpoint | None) -> None:
        """The replica's engine is there, or it has none."""
        _, known = self._engines.pop(replica, (0.0, None))
        if endpoint is not None:
            self._engines[replica] = self._clock(), endpoint
        if endpoint != known:
            self._change()

    async def tell_server(self, replica: str, url: str | None) -> bool:
        """An API process listens at this address, or no more; whether it was known."""
        known = self._servers.pop(replica, None)
        if url is not None:
            self._servers[replica] = self._clock(), url
        self._heard_at[replica] = self._clock()
        self._origins.expire(self._silence)
        return known is not None

    async def keep_origin(self, replica: str, origin: Origin) -> None:
        """The API process has a stream that is made of this."""
        self._origins.put(replica, origin)

    async def find_origin(self, stream_id: str) -> Origin | None:
        """What a stream is made of, if anybody has it, or had it a while ago."""
        self._origins.expire(self._silence)
        return self._origins.find(stream_id)

    async def drop_origins(self, stream_ids: list[str], replica: str | None = None) -> None:
        """See `Origins.drop`."""
        self._origins.drop(stream_ids, replica)

    async def servers(self) -> list[str]:
        """Addresses of the API processes."""
        return sorted(url for heard_at, url in self._servers.values() if self._is_listed(heard_at))

    async def engines(self) -> list[Endpoint]:
        return [endpoint for heard_at, endpoint in self._engines.values() if self._is_listed(heard_at)]

    async def watch(self, number: int) -> tuple[int, list[Endpoint]]:
        """The engines once there were changes since the one of this number, or after a while."""
        if number == self._number:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), WATCH_SECONDS)
        return self._number, await self.engines()

    def _silence(self, replica: str) -> float:
        return self._clock() - self._heard_at.setdefault(replica, self._clock())

    def _is_listed(self, heard_at: float) -> bool:
        return self._clock() - heard_at < LISTED_SECONDS

    def _change(self) -> None:
        self._number += 1
        self._changed.set()
        self._changed = asyncio.Event()
