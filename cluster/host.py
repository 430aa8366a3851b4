"""The engine process of a replica, as the replica sees it: started, listened to, replaced."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable

import msgspec

from shoal.cluster.messages import Endpoint, Listening, Load, Report
from shoal.cluster.process import Order
from shoal.scheduler.errors import ConfigError, EngineError
from shoal.server.engine.messages import Loading, StartFailed
from shoal.server.engine.supervisor import START_DELAYS
from shoal.server.settings import Settings

logger = logging.getLogger("shoal.cluster")

_decoder: msgspec.json.Decoder[Report] = msgspec.json.Decoder(Report)


class EngineHost:
    """Keeps an engine process running, and tells where it listens.

    Args:
        replica: name of the replica.
        host: at which API processes reach this machine.
        tell: called with the endpoint of each new process, and with None when it has ended.

    Attributes:
        load: what the engine said last.
    """

    def __init__(
        self, settings: Settings, replica: str, host: str, secret: str, tell: Callable[[Endpoint | None], None]
    ) -> None:
        self.load = Load()
        self._order = msgspec.json.encode(Order(settings.sections(), host, secret), enc_hook=str) + b"\n"
        self._replica = replica
        self._host = host
        self._tell = tell
        self._was_ready = False

    async def run(self) -> None:
        """Run processes, one after the other.

        Raises:
            ConfigError: the engine cannot start with these settings.
            EngineError: the first one ended before it was ready.
        """
        was_ready = False
        num_failures = 0
        while True:
            self._was_ready = False
            code = await self._run_one()
            was_ready |= self._was_ready
            if not was_ready:
                raise EngineError(f"the engine ended with exit code {code} at its start")
            num_failures = 0 if self._was_ready else num_failures + 1
            delay = START_DELAYS[min(num_failures, len(START_DELAYS) - 1)]
            logger.error("the engine ended with exit code %d; another is started in %.1f s", code, delay)
            await asyncio.sleep(delay)

    async def _run_one(self) -> int:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "shoal.cluster.process"), stdin=PIPE, stdout=PIPE
        )
        assert process.stdin is not None
        try:
            process.stdin.write(self._order)
            await self._listen(process)
            return await process.wait()
        finally:
            if self._was_ready:
                self._tell(None)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _listen(self, process: Process) -> None:
        """Take what the process says until it ends."""
        assert process.stdout is not None
        async for line in process.stdout:
            match _decoder.decode(line):
                case Loading(what):
                    logger.info("engine: %s", what)
                case StartFailed(message, param):
                    raise ConfigError(message, param=param)
                case Listening(port, fingerprint):
                    self._was_ready = True
                    self._tell(Endpoint(self._replica, f"tcp://{self._host}:{port}", fingerprint))
                case Load() as load:
                    self.load = load
