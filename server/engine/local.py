"""Runs an engine in a thread of this process."""

from __future__ import annotations

import asyncio
import logging
import threading
from queue import Empty, SimpleQueue

from shoal.scheduler.errors import EngineError
from shoal.server.engine.build import BuiltEngine, build_engine
from shoal.server.engine.client import EngineClient
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.messages import Command, News, Report, Stop
from shoal.server.engine.preparing import Preparing
from shoal.server.settings import Settings

logger = logging.getLogger("shoal.engine")


class LocalEngine:
    """Owns an engine's thread, and connects the client to it.  Implements `Wire` for the engine's loop."""

    def __init__(self, settings: Settings, client: EngineClient) -> None:
        self._settings = settings
        self._client = client
        self._event_loop = asyncio.get_running_loop()
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        """Load the model, and run the engine.

        Raises:
            CheckpointError, ConfigError: it cannot start with these settings.
        """
        engine = await asyncio.to_thread(build_engine, self._settings)
        self._thread = threading.Thread(target=self._run, args=(engine,), name="shoal-engine", daemon=True)
        self._thread.start()
        self._client.connect(engine.ready, self._commands.put)

    async def stop(self) -> None:
        """End the engine; it closes what it writes."""
        self._client.close()
        if self._thread is not None:
            self._commands.put(Stop())
            await asyncio.to_thread(self._thread.join)

    def send(self, report: Report) -> None:
        assert isinstance(report, News)
        self._event_loop.call_soon_threadsafe(self._client.take, report)

    def receive(self, seconds: float | None) -> list[Command]:
        commands: list[Command] = []
        if seconds != 0:
            try:
                commands.append(self._commands.get(timeout=seconds))
            except Empty:
                return commands
        while not self._commands.empty():
            commands.append(self._commands.get_nowait())
        return commands

    def _run(self, engine: BuiltEngine) -> None:
        try:
            EngineLoop(engine.core, Preparing(self, engine.grammars)).run()
        except (Exception, SystemExit) as error:  # whatever it is, no request may wait for ever
            logger.exception("the engine failed")
            self._event_loop.call_soon_threadsafe(self._client.give_up, EngineError(f"the engine failed: {error}"))
        finally:
            engine.close()
