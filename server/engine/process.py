"""The engine process: `python -m shoal.server.engine.process SOCKET_FOLDER`, its settings as JSON on standard input.

One thread.  It waits for commands while there is nothing to do, takes what has come between steps otherwise, and sends
what came of a step as one message.  It ends when it is told to, or with its parent: when its standard input ends.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import sys
import threading
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import msgspec
import zmq

from shoal.scheduler.errors import ShoalError
from shoal.server.engine.build import build_engine
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.messages import Command, Loading, Report, StartFailed
from shoal.server.engine.outbox import MAX_MESSAGES
from shoal.server.engine.packing import decode_hook
from shoal.server.engine.preparing import Preparing
from shoal.server.engine.watching import Watching
from shoal.server.settings import resolve


@dataclass(frozen=True)
class Sockets:
    """Implements `Wire` with two sockets in a folder that the API process made."""

    commands: zmq.Socket[bytes]
    reports: zmq.Socket[bytes]

    @classmethod
    def connect(cls, folder: Path) -> Sockets:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        commands, reports = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        for socket, name, most in ((commands, "commands", MAX_MESSAGES), (reports, "reports", 0)):
            socket.set_hwm(most)
            socket.connect(f"ipc://{folder / name}")
        return cls(commands, reports)

    def send(self, report: Report) -> None:
        self.reports.send(_encoder.encode(report))

    def receive(self, seconds: float | None) -> list[Command]:
        if seconds != 0:
            self.commands.poll(None if seconds is None else ceil(seconds * 1000))
        commands: list[Command] = []
        while True:
            try:
                commands.append(_decoder.decode(self.commands.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return commands


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command, dec_hook=decode_hook)


def _end_with_parent(folder: Path) -> None:
    """Wait for the end of standard input.  What the parent could not clean up any more is removed."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def give_up(reason: str) -> None:
    """End at once; another engine takes the place of this one."""
    logging.getLogger("shoal.engine").error("%s", reason)
    os._exit(1)


def main() -> None:
    # A terminal or a supervisor may send these to both processes: the API process drains, and ends this one.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    folder = Path(sys.argv[1])
    settings = resolve(msgspec.json.decode(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    sockets = Sockets.connect(folder)
    try:
        engine = build_engine(settings, lambda what: sockets.send(Loading(what)), give_up)
    except ShoalError as error:
        sockets.send(StartFailed(error.message, error.param))
        zmq.Context.instance().term()  # waits until it is sent
        sys.exit(1)
    gc.collect()
    gc.freeze()  # what is loaded stays; no collection need look at it again
    sockets.send(engine.ready)
    try:
        EngineLoop(engine.core, Watching(Preparing(sockets, engine.grammars), engine.core, settings.knobs)).run()
    except SystemExit as end:
        give_up(str(end))
    engine.close()


if __name__ == "__main__":
    main()
