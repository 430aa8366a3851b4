"""Starts the engine process, watches it, and puts another in its place when it dies or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from shoal.scheduler.errors import EngineError, ShoalError
from shoal.server.engine.child import EngineProcess
from shoal.server.engine.client import EngineClient
from shoal.server.engine.messages import Ready
from shoal.server.settings import Settings

logger = logging.getLogger("shoal.engine")

START_DELAYS = (0.0, 0.5, 1.0, 2.0, 5.0)  # seconds after so many failed starts in a row; the last one from then on
MAX_FAILED_STARTS = 3  # in a row, after which requests that wait for an engine end with an error


class EngineSupervisor:
    """Owns the engine processes, and connects the client to one of them.

    Args:
        launched: the first of them, if it is there already.
    """

    def __init__(self, settings: Settings, client: EngineClient, launched: EngineProcess | None = None) -> None:
        self._settings = settings
        self._client = client
        self._launched = launched
        self._task: asyncio.Task[None] | None = None
        self._first_start: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._standby: asyncio.Task[EngineProcess] | None = None

    async def start(self) -> Ready:
        """Start the engine and wait until it is ready.

        Raises:
            ConfigError: it cannot start with these settings.
            EngineError: it ended before it was ready.
        """
        self._task = asyncio.create_task(self._supervise())
        return await asyncio.shield(self._first_start)

    async def stop(self) -> None:
        """End the engine processes; they close what they write."""
        self._client.close()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _supervise(self) -> None:
        """Run engines, one after the other."""
        num_failures = 0
        try:
            while True:
                try:
                    engine = await self._next_engine()
                except Exception as error:  # whatever it is, no request may wait for ever
                    failure = error if isinstance(error, ShoalError) else EngineError(f"the engine failed: {error}")
                    if not self._first_start.done():
                        self._first_start.set_exception(failure)
                        return
                    num_failures += 1
                    delay = START_DELAYS[min(num_failures, len(START_DELAYS) - 1)]
                    logger.error("%s; the next start is in %.1f s", failure.message, delay)
                    if num_failures >= MAX_FAILED_STARTS:
                        self._client.give_up(EngineError(f"no engine could be started: {failure.message}"))
                    await asyncio.sleep(delay)
                else:
                    num_failures = 0
                    await self._run(engine)
        finally:
            if self._standby is not None:
                self._standby.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await (await self._standby).close(gently=True)

    async def _next_engine(self) -> EngineProcess:
        """An engine that is ready: the one that was launched before, the one that stands by, or a new one."""
        launched, self._launched = self._launched, None
        if launched is not None:
            await launched.wait_ready()
            return launched
        standby, self._standby = self._standby, None
        if standby is not None:
            with contextlib.suppress(Exception):  # a new one says what is wrong
                engine = await standby
                if not engine.ended.done():
                    return engine
                await engine.close(gently=False)
        return await EngineProcess.start(self._settings)

    async def _run(self, engine: EngineProcess) -> None:
        """Have the client work with an engine until it ends."""
        is_alive = True
        try:
            ready = engine.ready.result()
            engine.take, engine.see = self._client.take, self._client.events.take
            engine.hangs = lambda: self._client.hangs
            self._client.connect(ready, engine.send)
            if self._first_start.done():
                logger.info("the new engine is ready")
            else:
                self._first_start.set_result(ready)
            if self._settings.engine.standby:
                self._standby = asyncio.create_task(EngineProcess.start(self._settings))
            end = await asyncio.shield(engine.ended)
            is_alive = False
            self._client.lose()
            logger.error("the engine %s; another takes its place", end)
        finally:
            await engine.close(gently=is_alive)
