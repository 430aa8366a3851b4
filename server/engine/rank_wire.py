"""What rank 0 and another rank say to each other beside the model's numbers: who is who, and each step's arrays.

Messages are msgpack, each after its length.  An end that closes its connection has ended, which the other sees at once.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

import msgspec
import numpy as np

from shoal.model.step.batch import ForwardBatch
from shoal.server.fingerprint import model_hash

_LENGTH_BYTES = 4
_MAX_BYTES = 1 << 28  # of a message; what a client of HTTP says would be longer
_FIELDS = (
    "token_ids",
    "positions",
    "slot_mapping",
    "query_start_loc",
    "context_lens",
    "block_tables",
    "logits_indices",
)


class Challenge(msgspec.Struct, tag=True, frozen=True):
    """Bytes that nobody has seen before: who knows the secret answers with their digest.  Each end sends some first."""

    nonce: bytes


class Proof(msgspec.Struct, tag=True, frozen=True):
    """The answer to a challenge."""

    digest: bytes


class Hello(msgspec.Struct, tag=True, frozen=True):
    """Who a rank is; the engine has the same.

    Attributes:
        version: of Shoal.
        processor: on which numbers may depend.
        model: the checkpoint's hash.
    """

    version: str
    processor: str
    model: str

    @classmethod
    def of(cls, checkpoint: Path, device: str) -> Self:
        from importlib.metadata import version  # noqa: PLC0415 (every engine loads this module, and few have ranks)

        from shoal.model.backends.torch_ranks import processor  # noqa: PLC0415 (torch takes seconds to load)

        return cls(version("shoal"), processor(device), model_hash(checkpoint))

    def difference(self, other: Hello) -> str | None:
        """What of a rank differs from what the engine has, in words."""
        for name in self.__struct_fields__:
            own, its = getattr(self, name), getattr(other, name)
            if own != its:
                return f"its {name} is {its}, that of the engine {own}"
        return None


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """What a rank is to do.

    Attributes:
        split: ranks of each kind: tensor, expert, pipeline.
        store_port: where ranks find each other, on the engine's machine.
        keeps_all: see `ModelConfig`.
    """

    rank: int
    split: tuple[int, int, int]
    store_port: int
    dtype: Literal["float32", "bfloat16"]
    num_blocks: int
    block_size: int
    max_model_len: int
    keeps_all: bool


class Refused(msgspec.Struct, tag=True, frozen=True):
    """A rank is not taken, or could not load its part."""

    message: str


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """A rank is ready."""


class Step(msgspec.Struct, tag=True, frozen=True):
    """A `ForwardBatch`, with as many layers as it is computed with; None is all.

    Attributes:
        arrays: int32, those of _FIELDS.
        wants_hidden: whether hidden states are asked for.
    """

    arrays: list[bytearray]
    num_groups: int
    wants_hidden: bool
    num_layers: int | None

    @classmethod
    def of(cls, batch: ForwardBatch, num_layers: int | None) -> Self:
        arrays = [bytearray(np.ascontiguousarray(getattr(batch, name))) for name in _FIELDS]
        return cls(arrays, len(batch.slot_mapping), batch.hidden is not None, num_layers)

    def batch(self, hidden_size: int) -> ForwardBatch:
        arrays: dict[str, Any] = {
            name: np.frombuffer(array, np.int32) for name, array in zip(_FIELDS, self.arrays, strict=True)
        }
        arrays["slot_mapping"] = arrays["slot_mapping"].reshape(self.num_groups, -1)
        arrays["block_tables"] = arrays["block_tables"].reshape(len(arrays["context_lens"]), -1)
        shape = len(arrays["token_ids"]), hidden_size
        return ForwardBatch(**arrays, hidden=np.empty(shape, np.float32) if self.wants_hidden else None)


Message = Challenge | Proof | Hello | Welcome | Refused | Loaded | Step
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class StrangerError(Exception):
    """The other end is none of ours; the message follows the name of it."""


class RankSocket:
    """One end of the connection between rank 0 and another rank."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.host = str(connection.getsockname()[0])
        self.peer = "{}:{}".format(*connection.getpeername()[:2])

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            OSError: the other end has ended.
        """
        encoded = _encoder.encode(message)
        self.socket.sendall(len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded)

    def receive(self) -> Message | None:
        """The next message; None if the other end has ended.

        Raises:
            StrangerError: it is none of ours.
            TimeoutError: none came in the socket's time.
        """
        head = self._read(_LENGTH_BYTES)
        length = int.from_bytes(head or b"", "little")
        if length > _MAX_BYTES:
            raise StrangerError("is none of Shoal's engines and ranks")
        encoded = self._read(length)
        if not encoded:
            return None
        try:
            return _decoder.decode(encoded)
        except msgspec.DecodeError as error:
            raise StrangerError("is none of Shoal's engines and ranks") from error

    def refuse(self, reason: str) -> None:
        """Say why there is no more to say, if there is somebody to hear it."""
        with suppress(OSError):
            self.send(Refused(reason))
        self.close()

    def end(self) -> None:
        """Wake whoever waits here or at the other end: nothing comes any more."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()

    def _read(self, length: int) -> bytearray | None:
        """Exactly this number of bytes; None if the other end has ended before."""
        data, end = bytearray(length), 0
        with memoryview(data) as view:
            while end < length:
                try:
                    got = self.socket.recv_into(view[end:])
                except ConnectionError:
                    got = 0
                if not got:
                    return None
                end += got
        return data
