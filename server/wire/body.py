"""What all request bodies have in common."""

from __future__ import annotations

from msgspec import Struct


class Body(Struct, forbid_unknown_fields=True):
    """A request body, or an object in one."""

    def check(self) -> None:
        """Refuse what its fields' types cannot say.

        Raises:
            InvalidRequestError: a field is at fault.
        """
