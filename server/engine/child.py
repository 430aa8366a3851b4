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
from shoal.server.engine.events import Seen, UsesPolicy
from shoal.server.engine.messages import MAX_MESSAGES, Loading, News, Ready, Report, Sendable, StartFailed, Stop
from shoal.server.engine.outbox import Outbox
from shoal.server.engine.packing import encode_hook
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
        see: is told of its steps, if somebody watches.
        hangs: says whether to give it up.
    """

    def __init__(self) -> None:
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.take: Callable[[News], None] = lambda news: None
        self.see: Callable[[Seen | UsesPolicy], None] = lambda seen: None
        self.hangs: Callable[[], bool] = lambda: False
        self._folder = Path(tempfile.mkdtemp(prefix="shoal-"))
        self._context = zmq.asyncio.Context()
        self._commands = self._context.socket(zmq.PUSH)
        self._reports: zmq.Socket[bytes] = zmq.Socket(self._context, zmq.PULL)
        self._outbox = Outbox()
        self._num_reports = 0
        self._process: Process | None = None

    @classmethod
    async def start(cls, settings: Settings) -> EngineProcess:
        """Start a process, and wait until it is ready: see `launch` and `wait_ready`."""
        engine = await cls.launch(settings)
        await engine.wait_ready()
        return engine

    @classmethod
    async def launch(cls, settings: Settings) -> EngineProcess:
        """Start a process, which then loads the model; `wait_ready` says what came of it.

        Raises:
            ConfigError: the temporary folder has too long a name.
        """
        engine = cls()
        try:
            await engine._launch(settings)
        except BaseException:
            await engine.close(gently=False)
            raise
        return engine

    async def wait_ready(self) -> None:
        """Wait until it is ready; if it cannot be, it is closed.

        Raises:
            ConfigError: it cannot start with these settings.
            EngineError: it ended before it was ready.
        """
        try:
            await asyncio.wait((self.ready, self.ended), return_when=asyncio.FIRST_COMPLETED)
            if not self.ready.done():
                raise EngineError(f"the engine {self.ended.result()} at its start")
        except BaseException:
            await self.close(gently=False)
            raise

    def send(self, command: Sendable) -> None:
        self._outbox.put(command)

    async def close(self, *, gently: bool) -> None:
        """End the process, if it has not, and remove its sockets; it is asked first if that is to be done gently."""
        if self._process is not None:
            if gently and self.ready.done():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(STOP_SECONDS):
                        await self._commands.send(msgspec.msgpack.encode(Stop()))
                        await self._process.wait()
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            self.ended.cancel()
            await asyncio.gather(self.ended, return_exceptions=True)
        self._reports.close(linger=0)
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _launch(self, settings: Settings) -> None:
        if len(str(self._folder / "commands")) > zmq.IPC_PATH_MAX_LEN:
            raise ConfigError(
                f"{self._folder} has too long a name to hold sockets: set TMPDIR to a folder with a shorter one"
            )
        for socket, name, most in ((self._commands, "commands", MAX_MESSAGES), (self._reports, "reports", 0)):
            socket.set_hwm(most)
            socket.bind(f"ipc://{self._folder / name}")
        # -P: what lies in the working directory must not take the place of a library.
        command = (sys.executable, "-P", "-m", "shoal.server.engine.process", str(self._folder))
        # In a session of its own, so that a terminal's signals do not end it before it ignores them.
        self._process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(settings.sections(), enc_hook=str) + b"\n")
        self.ended = asyncio.create_task(self._watch(self._process))

    async def _watch(self, process: Process) -> str:
        """Deliver commands and take reports until the engine ends or hangs; returns how, in words.

        Raises:
            ConfigError: it says that it cannot start.
        """
        loop = asyncio.get_running_loop()
        receiving: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._reports.FD, self._receive, receiving)
        delivering, exited = asyncio.create_task(self._deliver()), asyncio.create_task(process.wait())
        tasks = receiving, exited, delivering
        try:
            self._receive(receiving)
            while not any(task.done() for task in tasks):
                await asyncio.wait(tasks, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if self.hangs():
                    return "hangs: it completes no step, though it has work"
            if delivering.done():
                delivering.result()
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
            logger.exception("what goes between this process and an engine could not be sent or taken")
            return f"failed: {error}"
        finally:
            loop.remove_reader(self._reports.FD)
            for task in tasks:
                task.cancel()

    async def _deliver(self) -> None:
        while True:
            await self._commands.send(msgspec.msgpack.encode(await self._outbox.get(), enc_hook=encode_hook))
            await asyncio.sleep(0)  # a socket with room for it does not wait

    def _receive(self, failed: asyncio.Future[None]) -> None:
        """Take all reports that have come: of those left here the socket's descriptor would not tell again."""
        try:
            while not failed.done():
                self._hear(_decoder.decode(self._reports.recv(zmq.NOBLOCK)))
        except zmq.Again:
            pass
        except Exception as error:
            failed.set_exception(error)

    def _hear(self, report: Report) -> None:
        self._num_reports += 1
        match report:
            case News() as news:
                self.take(news)
            case Seen() | UsesPolicy() as seen:
                self.see(seen)
            case Loading(what):
                logger.info("engine: %s", what)
            case Ready() as ready:
                self.ready.set_result(ready)
            case StartFailed(message, param):
                raise ConfigError(message, param=param)
