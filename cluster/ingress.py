"""An API process of a cluster: the server of one machine, with the engines of the cluster in place of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from dataclasses import replace

from shoal.scheduler.errors import ConfigError
from shoal.server.batches.runner import BatchRunner
from shoal.server.browsers import is_local
from shoal.server.engine.router import Router
from shoal.server.engine.share import give_way
from shoal.server.peers import Peers
from shoal.server.serve import GracefulServer
from shoal.server.settings import Settings
from shoal.server.setup import build_service
from shoal.server.start import listen

logger = logging.getLogger("shoal.cluster")

NUM_PORTS = 100  # from the one that is set on, of which the first is taken that is free


class _Server(GracefulServer):
    """Ray takes the signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ApiServer:
    """Serves HTTP at the first free port from the one that is set on, so that a machine may have several.

    Args:
        machine: address of this machine in the cluster.
        peers: the other API processes.

    Attributes:
        url: at which it is reached.
    """

    def __init__(self, settings: Settings, machine: str, peers: Peers) -> None:
        self._listener = _listen_near(settings.server.host, settings.server.port)
        port = self._listener.getsockname()[1]
        host = settings.server.host if is_local(settings.server.host) else machine
        self.url = f"{'https' if settings.server.ssl_certfile else 'http'}://{host}:{port}"
        # Files and batches are kept by whoever has them.
        folder = settings.server.data_folder.with_name(f"{settings.server.data_folder.name}-{port}")
        own = replace(settings, server=replace(settings.server, data_folder=folder))
        self.service, router = build_service(own, 0, peers)
        assert isinstance(router, Router)
        self.router = router
        self._ended = asyncio.Event()
        self._runner = BatchRunner(self.service)
        self._server = _Server(self.service, router, self._runner)

    async def run(self) -> None:
        """Serve until `stop` is called."""
        give_way(to_engines=True)  # this machine may have some
        self._runner.start()
        try:
            with contextlib.closing(self._listener):
                await self._server.serve([self._listener])
        finally:
            await self._runner.stop()
            await self.service.templates.close()
            await self.service.batches.close()
            if self.service.tracer is not None:
                await self.service.tracer.close()
            self._ended.set()

    async def stop(self) -> None:
        """Let unfinished requests go on for a while, and end."""
        self._server.should_exit = True
        await self._ended.wait()


def _listen_near(host: str, port: int) -> socket.socket:
    """Take a port.

    Raises:
        ConfigError: none of them is free, or the address is not this machine's.
    """
    for number in range(port, port + NUM_PORTS):
        try:
            return listen(host, number)
        except ConfigError as error:
            if error.param != "port" or number == port + NUM_PORTS - 1:
                raise
    raise AssertionError
