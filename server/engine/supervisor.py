"""Starts the engine process, watches it, and starts another when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from shoal.scheduler.errors import ConfigError, EngineError, ShoalError
from shoal.server.engine.client import EngineClient
from shoal.server.engine.messages import Command, Loading, News, Ready, Report, StartFailed, Stop
from shoal.server.settings import Settings

logger = logging.getLogger("shoal.engine")

RESTART_DELAYS = (0.0, 0.5, 1.0, 2.0, 5.0)  # seconds before each new start in a row; the last one from then on
STABLE_SECONDS = 60.0  # an engine that lived so long was not at fault in its start
LAST_WORDS_SECONDS = 0.2  # how long what a dead engine sent last may still be on its way
STOP_SECONDS = 2.0  # how long an engine may take to close what it writes


class EngineSupervisor:
    """Owns the engine process, and connects the client to it."""

    def __init__(self, settings: Settings, client: EngineClient) -> None:
        self._settings = settings
        self._client = client
        self._task: asyncio.Task[None] | None = None
        self._first_start: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._is_stopping = False

    async def start(self) -> Ready:
        """Start the engine and wait until it is ready.

        Raises:
            ConfigError: it cannot start with these settings.
            EngineError: it ended before it was ready.
        """
        self._task = asyncio.create_task(self._supervise())
        return await asyncio.shield(self._first_start)

    async def stop(self) -> None:
        """End the engine process; it closes what it writes."""
        self._is_stopping = True
        self._client.close()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _supervise(self) -> None:
        """Run engine processes, one after the other."""
        num_failures = 0
        while True:
            began = time.monotonic()
            try:
                exit_code = await self._run_process()
            except Exception as error:  # whatever it is, no request may wait for ever
                failure = error if isinstance(error, ShoalError) else EngineError(f"the engine failed: {error}")
                if not self._first_start.done():
                    self._first_start.set_exception(failure)
                    return
                logger.error("%s", failure.message)
                exit_code = 1
            if not self._first_start.done():
                self._first_start.set_exception(
                    EngineError(f"the engine ended with exit code {exit_code} at its start")
                )
                return
            self._client.lose(EngineError("the engine died while it worked on this request; a new one is starting"))
            num_failures = 0 if time.monotonic() - began > STABLE_SECONDS else num_failures + 1
            delay = RESTART_DELAYS[min(num_failures, len(RESTART_DELAYS) - 1)]
            logger.error("the engine died with exit code %s; starting a new one in %.1f s", exit_code, delay)
            await asyncio.sleep(delay)

    async def _run_process(self) -> int:
        """Run one engine process until it ends; returns its exit code.

        Raises:
            ConfigError: it says that it cannot start.
        """
        folder = Path(tempfile.mkdtemp(prefix="shoal-"))
        context = zmq.asyncio.Context()
        commands, reports = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        try:
            for socket, name in ((commands, "commands"), (reports, "reports")):
                socket.set_hwm(0)
                socket.bind(f"ipc://{folder / name}")
            # -P: what lies in the working directory must not take the place of a library.
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "shoal.server.engine.process", str(folder), stdin=asyncio.subprocess.PIPE
            )
            try:
                assert process.stdin is not None
                process.stdin.write(msgspec.json.encode(self._settings.sections(), enc_hook=str) + b"\n")
                return await self._listen(commands, reports, process)
            finally:
                await self._end(commands, process)
        finally:
            context.destroy(linger=0)
            shutil.rmtree(folder, ignore_errors=True)

    async def _end(self, commands: zmq.asyncio.Socket, process: asyncio.subprocess.Process) -> None:
        if self._is_stopping and self._first_start.done():
            commands.send(msgspec.msgpack.encode(Stop()))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    async def _listen(
        self, commands: zmq.asyncio.Socket, reports: zmq.asyncio.Socket, process: asyncio.subprocess.Process
    ) -> int:
        """Take reports until the process ends; returns its exit code."""
        receiving = asyncio.create_task(self._receive(commands, reports))
        ended = asyncio.create_task(process.wait())
        try:
            await asyncio.wait((receiving, ended), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait((receiving,), timeout=LAST_WORDS_SECONDS)
            if receiving.done():
                receiving.result()
            return await ended
        finally:
            receiving.cancel()
            ended.cancel()

    async def _receive(self, commands: zmq.asyncio.Socket, reports: zmq.asyncio.Socket) -> None:
        def send(command: Command) -> None:
            commands.send(msgspec.msgpack.encode(command))

        decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
        while True:
            match decoder.decode(await reports.recv()):
                case News() as news:
                    self._client.take(news)
                case Loading(what):
                    logger.info("engine: %s", what)
                case Ready() as ready:
                    self._client.connect(ready, send)
                    if self._first_start.done():
                        logger.info("the new engine is ready")
                    else:
                        self._first_start.set_result(ready)
                case StartFailed(message, param):
                    raise ConfigError(message, param=param)
