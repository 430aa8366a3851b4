"""One engine process, as the API process sees it: started, listened to, ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from shoal.scheduler.errors import ConfigError, EngineError
from shoal.server.engine.messages import Command, Loading, News, Ready, Report, StartFailed, Stop
from shoal.server.settings import Settings

logger = logging.getLogger("shoal.engine")

LAST_WORDS_SECONDS = 0.01  # a dead engine that was silent for so long has said all that it had to say
STOP_SECONDS = 2.0  # how long an engine may take to close what it writes
LOOK_SECONDS = 0.1  # how often it is looked whether an engine hangs

_decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


class EngineProcess:
    """One engine process, and the sockets that join it to this one.

    Attributes:
        ready: what it said when it was ready.
        ended: how it ended, in words.
        take: is told of its news.
        hangs: says whether to give it up.
    """

    def __init__(self) -> None:
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.take: Callable[[News], None] = lambda news: None
        self.hangs: Callable[[], bool] = lambda: False
        self._folder = Path(tempfile.mkdtemp(prefix="shoal-"))
        self._context = zmq.asyncio.Context()
        self._commands, self._reports = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        self._num_reports = 0
        self._process: Process | None = None

    @classmethod
    async def start(cls, settings: Settings) -> EngineProcess:
        """Start a process, and wait until it is ready.

        Raises:
            ConfigError: it cannot start with these settings.
            EngineError: it ended before it was ready.
        """
        engine = cls()
        try:
            await engine._launch(settings)
            await asyncio.wait((engine.ready, engine.ended), return_when=asyncio.FIRST_COMPLETED)
            if not engine.ready.done():
                raise EngineError(f"the engine {engine.ended.result()} at its start")
        except BaseException:
            await engine.close(gently=False)
            raise
        return engine

    def send(self, command: Command) -> None:
        self._commands.send(msgspec.msgpack.encode(command))

    async def close(self, *, gently: bool) -> None:
        """End the process, and remove its sockets; it is asked first if that is to be done gently."""
        if self._process is not None:
            if gently and self.ready.done():
                self.send(Stop())
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            self.ended.cancel()
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _launch(self, settings: Settings) -> None:
        if len(str(self._folder / "commands")) > zmq.IPC_PATH_MAX_LEN:
            raise ConfigError(
                f"{self._folder} has too long a name to hold sockets: set TMPDIR to a folder with a shorter one"
            )
        for socket, name in ((self._commands, "commands"), (self._reports, "reports")):
            socket.set_hwm(0)
            socket.bind(f"ipc://{self._folder / name}")
        # -P: what lies in the working directory must not take the place of a library.
        command = (sys.executable, "-P", "-m", "shoal.server.engine.process", str(self._folder))
        self._process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE)
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(settings.sections(), enc_hook=str) + b"\n")
        self.ended = asyncio.create_task(self._watch(self._process))

    async def _watch(self, process: Process) -> str:
        """Take reports until the engine ends or hangs; returns how, in words.

        Raises:
            ConfigError: it says that it cannot start.
        """
        receiving, exited = asyncio.create_task(self._receive()), asyncio.create_task(process.wait())
        try:
            while not (receiving.done() or exited.done()):
                await asyncio.wait((receiving, exited), timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if self.hangs():
                    return "hangs: it completes no step, though it has work"
            num_heard = -1
            while not receiving.done() and num_heard < self._num_reports:
                num_heard = self._num_reports
                await asyncio.wait((receiving,), timeout=LAST_WORDS_SECONDS)
            if receiving.done():
                receiving.result()
            return f"died with exit code {await exited}"
        except ConfigError:
            raise
        except Exception as error:  # whatever it is, no request may wait for ever
            logger.exception("what an engine sent could not be taken")
            return f"failed: {error}"
        finally:
            receiving.cancel()
            exited.cancel()

    async def _receive(self) -> None:
        while True:
            report = _decoder.decode(await self._reports.recv())
            self._num_reports += 1
            match report:
                case News() as news:
                    self.take(news)
                case Loading(what):
                    logger.info("engine: %s", what)
                case Ready() as ready:
                    self.ready.set_result(ready)
                case StartFailed(message, param):
                    raise ConfigError(message, param=param)
