"""One engine process, as the API process sees it: started, listened to, ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import Callable

import msgspec

from shoal.scheduler.errors import ConfigError, EngineError
from shoal.server.engine.events import Seen, UsesPolicy
from shoal.server.engine.messages import Begin, Command, Loading, News, Ready, Report, StartFailed, Stop
from shoal.server.engine.outbox import Outbox
from shoal.server.engine.sockets import CHUNK_BYTES, Frames, frame
from shoal.server.settings import Settings

logger = logging.getLogger("shoal.engine")

LAST_WORDS_SECONDS = 1.0  # between the exit of an engine and the end of what it said, whichever comes first
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
        self._socket, self._its_socket = socket.socketpair()
        self._socket.setblocking(False)
        self._frames = Frames()
        self._outbox = Outbox()
        self._process: Process | None = None

    @classmethod
    async def start(cls, settings: Settings) -> EngineProcess:
        """Start a process, and wait until it is ready: see `launch` and `wait_ready`."""
        engine = await cls.launch(settings)
        await engine.wait_ready()
        return engine

    @classmethod
    async def launch(cls, settings: Settings) -> EngineProcess:
        """Start a process, which then loads the model; `wait_ready` says what came of it."""
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

    def send(self, command: Command) -> None:
        self._outbox.put(command)

    async def close(self, *, gently: bool) -> None:
        """End the process, if it has not, and remove its sockets; it is asked first if that is to be done gently."""
        if self._process is not None:
            if gently and self.ready.done():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(STOP_SECONDS):
                        self.send(Stop())
                        await self._process.wait()
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            self.ended.cancel()
            await asyncio.gather(self.ended, return_exceptions=True)
        self._socket.close()
        self._its_socket.close()

    async def _launch(self, settings: Settings) -> None:
        # -P: what lies in the working directory must not take the place of a library.
        command = (sys.executable, "-P", "-m", "shoal.server.engine.process")
        # In a session of its own, so that a terminal's signals do not end it before it ignores them.
        self._process = await asyncio.create_subprocess_exec(
            *command, stdin=self._its_socket.fileno(), start_new_session=True
        )
        self._its_socket.close()
        self.ended = asyncio.create_task(self._watch(self._process))
        self.send(Begin(msgspec.to_builtins(settings.sections(), enc_hook=str)))

    async def _watch(self, process: Process) -> str:
        """Deliver commands and take reports until the engine ends or hangs; returns how, in words.

        Raises:
            ConfigError: it says that it cannot start.
        """
        loop = asyncio.get_running_loop()
        receiving: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._socket, self._receive, receiving)
        delivering, exited = asyncio.create_task(self._deliver()), asyncio.create_task(process.wait())
        try:
            while not (receiving.done() or exited.done() or delivering.done()):
                tasks = receiving, exited, delivering
                await asyncio.wait(tasks, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if self.hangs():
                    return "hangs: it completes no step, though it has work"
            await asyncio.wait((receiving, exited), timeout=LAST_WORDS_SECONDS)
            if receiving.done():
                receiving.result()
            return f"died with exit code {exited.result()}" if exited.done() else "closed its end of the sockets"
        except ConfigError:
            raise
        except Exception as error:  # whatever it is, no request may wait for ever
            logger.exception("what goes between this process and an engine could not be sent or taken")
            return f"failed: {error}"
        finally:
            loop.remove_reader(self._socket)
            for task in (receiving, exited, delivering):
                task.cancel()

    async def _deliver(self) -> None:
        with contextlib.suppress(ConnectionError):  # it is gone, of which others tell
            while True:
                command = await self._outbox.get()
                await asyncio.get_running_loop().sock_sendall(self._socket, frame(command))

    def _receive(self, ended: asyncio.Future[None]) -> None:
        """Take what has come; there may be more, of which the socket tells again."""
        try:
            data = self._socket.recv(CHUNK_BYTES)
            for message in self._frames.take(data):
                self._hear(_decoder.decode(message))
            if not data:
                ended.set_result(None)
        except ConnectionError:  # it ended before it had read all that was sent
            ended.set_result(None)
        except Exception as error:
            ended.set_exception(error)
        if ended.done():
            asyncio.get_running_loop().remove_reader(self._socket)

    def _hear(self, report: Report) -> None:
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
