"""What joins an engine process to the API process: two sockets of zmq, of which `child.py` has the other ends."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path

import msgspec
import zmq

from shoal.server.engine.messages import MAX_MESSAGES, Command, Report
from shoal.server.engine.packing import decode_hook

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command, dec_hook=decode_hook)


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
