"""Where everything in a cluster is: an actor that replicas tell, and that API processes ask."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import count
from typing import TypeVar

from msgspec.structs import replace

from shoal.cluster.messages import Endpoint, Standing
from shoal.cluster.origins import Origins
from shoal.server.peers import Origin
from shoal.server.wire.responses import Cluster, ClusterEngine, ClusterServer

LISTED_SECONDS = 5.0  # for which a replica is listed after it was heard of last
TELL_SECONDS = 1.0  # between two times that it tells where it is
WATCH_SECONDS = 10.0

Told = TypeVar("Told")


class Directory:
    """What is there.  But for the secret it keeps nothing that its replicas would not tell it again within a second.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._engines: dict[str, tuple[float, Standing]] = {}
        self._servers: dict[str, tuple[float, ClusterServer]] = {}
        self._heard_at: dict[str, float] = {}  # of API processes
        self._origins = Origins()
        self._secret = ""
        self._changed = asyncio.Event()
        self._number = 0  # of changes

    async def keep_secret(self, secret: str) -> str:
        """The secret that came first."""
        self._secret = self._secret or secret
        return self._secret

    async def tell_engine(self, standing: Standing) -> int:
        """How a replica stands; its number, the least that no other one has."""
        known = self._engines.pop(standing.replica, None)
        taken = {one.number for one in self._listed(self._engines)}
        number = standing.number if known is None else known[1].number
        if number is None or number in taken:
            number = next(free for free in count() if free not in taken)
        told = replace(standing, number=number)
        self._engines[standing.replica] = self._clock(), told
        if known is None or told.endpoint != known[1].endpoint:
            self._change()
        return number

    async def leave(self, replica: str) -> None:
        """A replica ends."""
        self._servers.pop(replica, None)
        if self._engines.pop(replica, None) is not None:
            self._change()

    async def tell_server(self, server: ClusterServer) -> bool:
        """An API process is there; whether it was known."""
        known = self._servers.pop(server.replica, None)
        self._servers[server.replica] = self._clock(), server
        self._heard_at[server.replica] = self._clock()
        self._origins.expire(self._silence)
        return known is not None

    async def describe(self) -> Cluster:
        """All that is there."""
        engines = [
            ClusterEngine(
                str(one.number),
                one.replica,
                one.node,
                one.endpoint is not None,
                one.address,
                one.fingerprint,
                one.load.num_unfinished,
                one.load.queue_seconds,
                one.load.kv_cache_usage,
            )
            for one in self._listed(self._engines)
        ]
        servers = self._listed(self._servers)
        return Cluster(sorted(engines, key=lambda one: int(one.engine)), sorted(servers, key=lambda one: one.url))

    async def engines(self) -> list[Endpoint]:
        endpoints = [one.endpoint for one in self._listed(self._engines)]
        return [one for one in endpoints if one is not None]

    async def keep_origin(self, replica: str, origin: Origin) -> bool:
        """The API process has a stream that is made of this; returns that it is known now."""
        self._heard_at[replica] = self._clock()
        self._origins.put(replica, origin)
        return True

    async def find_origin(self, stream_id: str) -> list[Origin]:
        """What a stream is made of, if anybody has it, or had it a while ago; else nothing."""
        self._origins.expire(self._silence)
        found = self._origins.find(stream_id)
        return [] if found is None else [found]

    async def drop_origins(self, stream_ids: list[str], replica: str | None = None) -> None:
        """See `Origins.drop`."""
        self._origins.drop(stream_ids, replica)

    async def watch(self, number: int) -> tuple[int, list[Endpoint]]:
        """The engines once there were changes since the one of this number, or after a while."""
        if number == self._number:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), WATCH_SECONDS)
        return self._number, await self.engines()

    def _silence(self, replica: str) -> float:
        return self._clock() - self._heard_at.setdefault(replica, self._clock())

    def _listed(self, told: Mapping[str, tuple[float, Told]]) -> list[Told]:
        """Those who were heard of lately."""
        return [one for heard_at, one in told.values() if self._clock() - heard_at < LISTED_SECONDS]

    def _change(self) -> None:
        self._number += 1
        self._changed.set()
        self._changed = asyncio.Event()
