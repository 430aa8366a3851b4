"""The engines of a cluster as an API process has them: a client of the router for each, joined while it is there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from shoal.cluster.link import Link
from shoal.cluster.messages import Endpoint
from shoal.cluster.secret import Keys
from shoal.scheduler.errors import EngineError
from shoal.server.engine.client import EngineClient
from shoal.server.engine.router import Router

logger = logging.getLogger("shoal.cluster")

RETRY_SECONDS = 0.5  # after a connection that broke
LAST_SECONDS = 30.0  # without any engine, after which requests end


class Fleet:
    """Joins clients of a router to the engines that are listed, if these give the tokens that they must.

    A client is of one engine after the other: those that have its number.

    Args:
        make_client: of a name.
        fingerprint: that an engine must have.
        machine: address of this one.
    """

    def __init__(
        self,
        router: Router,
        make_client: Callable[[str], EngineClient],
        keys: Keys,
        fingerprint: str,
        machine: str = "127.0.0.1",
    ) -> None:
        self._router = router
        self._make_client = make_client
        self._keys = keys
        self._fingerprint = fingerprint
        self._machine = machine
        self._joined: dict[Endpoint, tuple[EngineClient, asyncio.Task[None]]] = {}
        self._last_seen = asyncio.get_running_loop().time()

    def update(self, endpoints: Iterable[Endpoint]) -> None:
        """Take in which engines there are."""
        listed = {endpoint for endpoint in endpoints if endpoint.fingerprint == self._fingerprint}
        for endpoint in self._joined.keys() - listed:
            client, task = self._joined.pop(endpoint)
            client.retire()
            task.cancel()
        for endpoint in listed - self._joined.keys():
            client = self._free_client(str(endpoint.number))
            self._joined[endpoint] = client, asyncio.create_task(self._join(endpoint, client))

    def check(self) -> None:
        """End the requests if there has been no engine for too long."""
        now = asyncio.get_running_loop().time()
        if any(client.is_connected for client in self._router.clients):
            self._last_seen = now
        elif now - self._last_seen > LAST_SECONDS:
            error = EngineError(f"no engine is left that has the fingerprint {self._fingerprint}")
            for client in self._router.clients:
                client.give_up(error)

    async def close(self) -> None:
        """End all connections."""
        tasks = [task for _, task in self._joined.values()]
        self._joined.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _free_client(self, name: str) -> EngineClient:
        taken = [client for client, _ in self._joined.values()]
        free = (client for client in self._router.clients if client.name == name and client not in taken)
        if (client := next(free, None)) is None:
            client = self._make_client(name)
            self._router.add(client)
        return client

    async def _join(self, endpoint: Endpoint, client: EngineClient) -> None:
        """Be joined to an engine for as long as it is listed."""
        said = ""
        while True:
            try:
                await Link(endpoint, client, self._keys, self._fingerprint, self._machine).run()
            except EngineError as error:
                if error.message != said:
                    said = error.message
                    logger.error("%s", said)
            await asyncio.sleep(RETRY_SECONDS)
