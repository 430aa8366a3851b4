"""What joins an engine process to the API process: a pair of connected sockets, with a length before each message.

The engine's end is its standard input; so both know at once when the other is gone, and nothing lies in a folder.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil

import msgspec

from shoal.server.engine.messages import Command, Report
from shoal.server.engine.packing import decode_hook, encode_hook

LENGTH_BYTES = 4
CHUNK_BYTES = 65536  # read at once

_encoder = msgspec.msgpack.Encoder(enc_hook=encode_hook)
_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command, dec_hook=decode_hook)


def frame(message: Command | Report) -> bytearray:
    """A message as it crosses."""
    framed = bytearray(LENGTH_BYTES)
    _encoder.encode_into(message, framed, LENGTH_BYTES)
    framed[:LENGTH_BYTES] = (len(framed) - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little")
    return framed


class Frames:
    """Cuts what comes into messages, which are still encoded."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def take(self, data: bytes) -> Iterator[bytes]:
        """The messages that have come in full; all of them must be taken."""
        self._rest += data
        begin = 0
        while (start := begin + LENGTH_BYTES) <= len(self._rest):
            end = start + int.from_bytes(self._rest[begin:start], "little")
            if end > len(self._rest):
                break
            yield bytes(self._rest[start:end])
            begin = end
        del self._rest[:begin]


@dataclass(frozen=True)
class EngineSocket:
    """The engine's end.  Implements `Wire`.

    Raises:
        EOFError, ConnectionError: the API process is gone; from `send` and `receive`.
    """

    socket: socket.socket
    _frames: Frames = field(default_factory=Frames)

    def send(self, report: Report) -> None:
        """Waits while the API process reads nothing, so that what it has not read does not pile up."""
        self.socket.sendall(frame(report))

    def receive(self, seconds: float | None) -> list[Command]:
        if seconds != 0:
            poller = select.poll()
            poller.register(self.socket, select.POLLIN)
            poller.poll(None if seconds is None else ceil(seconds * 1000))
        commands: list[Command] = []
        while True:
            try:
                data = self.socket.recv(CHUNK_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return commands
            if not data:
                raise EOFError
            commands += map(_decoder.decode, self._frames.take(data))
