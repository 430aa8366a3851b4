"""What all request bodies have in common."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

from msgspec import Struct


class Refusal(NamedTuple):
    """What the server says to a field that other servers know and that would change the answer.

    Attributes:
        neutral: a number by which the field asks for nothing.
    """

    reason: str
    neutral: float = 0


class Body(Struct, forbid_unknown_fields=True):
    """A request body, or an object in one.

    Attributes:
        aliases: other names that a field is known by.
        refused: fields that are known, and refused unless they ask for nothing.
    """

    aliases: ClassVar[Mapping[str, str]] = MappingProxyType({})
    refused: ClassVar[Mapping[str, Refusal]] = MappingProxyType({})

    def check(self) -> None:
        """Refuse what its fields' types cannot say.

        Raises:
            InvalidRequestError: a field is at fault.
        """
