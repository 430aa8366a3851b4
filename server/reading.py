"""Reads the bodies of requests as the settings have it."""

from __future__ import annotations

import logging
from typing import Literal

from fastapi import Request

from shoal.server.wire.parsing import Kind, parse_body

logger = logging.getLogger("shoal.api")

MAX_TOLD = 1000  # names of fields that were logged, which come from clients


class BodyReader:
    """Reads bodies.  A field that the server does not know is refused, or ignored: then the answer names it.

    Args:
        unknown_fields: what becomes of them.
    """

    def __init__(self, unknown_fields: Literal["ignore", "refuse"]) -> None:
        self._ignores = unknown_fields == "ignore"
        self._told: set[str] = set()

    async def read(self, request: Request, kind: type[Kind]) -> Kind:
        """The body of a request; raises as `parse_body` does."""
        ignored: list[str] | None = [] if self._ignores else None
        body = parse_body(kind, await request.body(), ignored)
        if ignored:
            names = [ascii(name)[1:-1] for name in ignored]  # a header holds no others
            request.state.ignored_fields = names
            self._tell(set(names) - self._told)
        return body

    def _tell(self, names: set[str]) -> None:
        """Log each name once."""
        if names and len(self._told) < MAX_TOLD:
            self._told |= names
            logger.warning("fields that the server does not know are ignored: %s", ", ".join(sorted(names)))
