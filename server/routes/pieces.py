"""Large answers: made and sent piece by piece, so that others have their turn meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import msgspec
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from shoal.server.routes.answer import encode, unless_disconnected

# They stand in an answer for what is encoded elsewhere: a value, or the entries of a list.  No JSON has this byte.
GAP: Any = msgspec.Raw(b"\0")
HOLE: Any = msgspec.Raw(b"[\0]")
MAX_PIECE_BYTES = 64 * 1024
MAX_VALUES = 4096  # of a list that are encoded at once


class Entries:
    """The entries of the lists in some shapes, which are encoded as they come: as objects they would fill the memory.

    Args:
        shapes: with empty lists, in whose places holes are put; a shape may be None, of which nothing comes.
    """

    def __init__(self, shapes: Sequence[msgspec.Struct | None]) -> None:
        self._lists: list[dict[str, bytearray]] = []
        for shape in shapes:
            names = [name for name in shape.__struct_fields__ if getattr(shape, name) == []] if shape else []
            self._lists.append({name: bytearray() for name in names})
            for name in names:
                setattr(shape, name, HOLE)

    def add(self, index: int, part: msgspec.Struct | None) -> None:
        """Add the entries of a part to those of the shape with this index."""
        for name, entries in self._lists[index].items():
            _add_entries(entries, getattr(part, name))

    def encoded(self, index: int) -> list[bytearray]:
        """What fills the holes of the shape with this index, in their order."""
        return list(self._lists[index].values())


async def encode_entries(values: Sequence[object]) -> bytearray:
    """The entries of one long list."""
    return await encode_parts(values[at : at + MAX_VALUES] for at in range(0, len(values), MAX_VALUES))


async def encode_parts(parts: Iterable[Sequence[object]]) -> bytearray:
    """The entries of one list that is made part by part."""
    entries = bytearray()
    for part in parts:
        if entries:
            await asyncio.sleep(0)
        _add_entries(entries, part)
    return entries


def _add_entries(entries: bytearray, values: Sequence[object]) -> None:
    if values:
        entries += b"," if entries else b""
        entries += encode(values)[1:-1]


def filled(body: object, entries: Iterable[bytes | bytearray]) -> list[bytes | bytearray]:
    """The pieces of an answer with these entries in its holes."""
    gaps = encode(body).split(b"\0")
    return [piece for pair in zip_longest(gaps, entries, fillvalue=b"") for piece in pair]


def in_pieces(pieces: Sequence[bytes | bytearray], headers: Mapping[str, str] | None = None) -> Response:
    """An answer of JSON, sent piece by piece if it is large."""
    if sum(map(len, pieces)) <= MAX_PIECE_BYTES:
        return Response(b"".join(pieces), media_type="application/json", headers=headers)
    return _InPieces(pieces, headers or {})


def whole_body(response: Response) -> bytes:
    """The body of an answer that is no stream."""
    return b"".join(response.pieces) if isinstance(response, _InPieces) else bytes(response.body)


class _InPieces(StreamingResponse):
    """Sends pieces, and waits where the client does."""

    media_type = "application/json"

    def __init__(self, pieces: Sequence[bytes | bytearray], headers: Mapping[str, str]) -> None:
        self.pieces = pieces
        super().__init__(_turns(pieces), headers={**headers, "content-length": str(sum(map(len, pieces)))})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_disconnected(receive, self.stream_response(send))


async def _turns(pieces: Sequence[bytes | bytearray]) -> AsyncGenerator[bytes]:
    for piece in pieces:
        for at in range(0, len(piece), MAX_PIECE_BYTES):
            yield bytes(piece[at : at + MAX_PIECE_BYTES])
            await asyncio.sleep(0)
