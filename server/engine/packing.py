"""Prompts as both processes keep them, and as they cross between them: 4 bytes for a token, where a list has 40."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    TokenIds = Sequence[int]
else:
    TokenIds = array  # what a decoder makes of it: see `pack`


def pack(token_ids: Iterable[int]) -> TokenIds:
    """Token ids with 4 bytes for each; a list of them has 40."""
    return array("i", token_ids)


def encode_hook(value: Any) -> bytes:
    """What msgpack has for packed token ids."""
    assert isinstance(value, array)
    return value.tobytes()


def decode_hook(kind: type, value: Any) -> Any:
    assert kind is array
    return array("i", value)
