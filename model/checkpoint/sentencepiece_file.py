"""Reads a `tokenizer.model`, the file of the SentencePiece library.

It is one message of Protocol Buffers (https://protobuf.dev/programming-guides/encoding): fields, each a key, which is
its number and the type of its value, and the value.  SentencePiece's own `sentencepiece_model.proto` says what the
numbers mean; those that matter here stand below.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.model.checkpoint.vocabulary import Kind, Pieces
from shoal.scheduler.errors import CheckpointError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_WIDTHS = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES = 10
# Of the model: its pieces, how it was trained, and how it normalizes.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_ALGORITHM, _SUFFIX, _BYTE_FALLBACK, _UNKNOWN_ID, _BOS_ID, _EOS_ID = 3, 24, 35, 40, 41, 42
_CHARSMAP, _PREFIX, _SQUEEZES, _ESCAPES = 2, 3, 4, 5
_ALGORITHMS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What the file holds.

    Attributes:
        algorithm: "unigram" or "bpe".
        bos_id, eos_id: None where it has none.
    """

    pieces: Pieces
    algorithm: str
    bos_id: int | None
    eos_id: int | None


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read the file.

    Raises:
        CheckpointError: naming the file: not readable, not of SentencePiece, or of an unsupported kind.
    """
    try:
        return _model(path, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", param=path.name) from error
    except (ValueError, TypeError, struct.error) as error:
        message = f"{path}: not a file of SentencePiece ({error}); a tokenizer.json is needed"
        raise CheckpointError(message, param=path.name) from error


def _model(path: Path, data: bytes) -> SentencePieceModel:
    parts = list(_fields(data))
    rows = [_piece(value) for number, value in parts if number == _PIECES]
    trainer, normalizer = (_merged(parts, number) for number in (_TRAINER, _NORMALIZER))
    algorithm = _ALGORITHMS.get(trainer.get(_ALGORITHM, 1), "unknown")
    if algorithm not in ("unigram", "bpe") or trainer.get(_SUFFIX) or not normalizer.get(_ESCAPES, True):
        message = f"{path}: kind {algorithm!r} or its treatment of spaces is not supported; a tokenizer.json is needed"
        raise CheckpointError(message, param=path.name)
    tokens = [text for text, _, _ in rows]
    unknown = trainer.get(_UNKNOWN_ID, 0)
    if unknown >= len(tokens) or len(set(tokens)) < len(tokens):
        raise ValueError("its pieces are inconsistent")
    pieces = Pieces(
        tokens=tokens,
        scores=[score for _, score, _ in rows],
        kinds=[kind for _, _, kind in rows],
        unknown_id=unknown,
        byte_fallback=bool(trainer.get(_BYTE_FALLBACK)),
        prefix=bool(normalizer.get(_PREFIX, True)),
        squeezes=bool(normalizer.get(_SQUEEZES, True)),
        charsmap=normalizer.get(_CHARSMAP, b""),
    )
    bos, eos = (trainer.get(number, default) for number, default in ((_BOS_ID, 1), (_EOS_ID, 2)))
    return SentencePieceModel(
        pieces, algorithm, *(token_id if token_id < len(tokens) else None for token_id in (bos, eos))
    )


def _piece(data: bytes) -> tuple[str, float, int]:
    """Text, score and kind."""
    values = dict(_fields(data))
    (score,) = struct.unpack("<f", values.get(_SCORE, bytes(4)))
    if not isinstance(text := values.get(_TEXT), bytes):
        raise ValueError("a piece has no text")
    return text.decode(), score, values.get(_KIND, int(Kind.NORMAL))


def _merged(parts: Sequence[tuple[int, Any]], number: int) -> dict[int, Any]:
    """The fields of the messages with that number; the last of each counts."""
    return {name: value for part, data in parts if part == number for name, value in _fields(data)}


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The numbers and values of the message's fields.  A negative number (-1 for no id) comes as a huge one.

    Raises:
        ValueError: the bytes are no message.
    """
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        length = _FIXED_WIDTHS.get(kind)
        if kind == _BYTES:
            length, position = _varint(data, position)
        if length is None or length > len(data) - position:
            raise ValueError(f"a broken field at byte {position}")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The integer whose bytes hold 7 bits each, the lowest first, and the place behind it."""
    value = 0
    for count, byte in enumerate(data[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return value, position + count + 1
    raise ValueError(f"a broken number at byte {position}")
