"""What an API process asks of a cluster that it is part of, and what it tells the others of its streams."""

from __future__ import annotations

from random import Random
from typing import NamedTuple, Protocol

from fastapi import Request
from msgspec import Struct

from shoal.server.wire.responses import Cluster


class Identity(NamedTuple):
    """By what an answer differs from every other one to the same request.

    Attributes:
        created: Unix time.
    """

    id: str
    created: int
    seed: int


class Origin(Struct, frozen=True):
    """What a stream is made of: whoever has it makes the same events.

    Attributes:
        maker: version of Shoal and fingerprint; other makers might choose other tokens.
        owner: of the stream, see `owner_name`.
        path: of the endpoint.
        headers: that the endpoint reads, but for keys.
        keep_seconds: for which it is kept after the API process that has the stream was heard of last.
    """

    identity: Identity
    maker: str
    owner: str
    path: str
    headers: dict[str, str]
    body: bytes
    keep_seconds: float

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return len(self.body) + 1024


class Peers(Protocol):
    """The other API processes of a cluster.  Asking takes a second at most; without an answer it is None."""

    async def describe(self) -> Cluster | None:
        """All engines and API processes."""

    async def note(self, origin: Origin) -> None:
        """Have the others know of a stream that begins here."""

    async def find(self, stream_id: str) -> Origin | None:
        """What a stream is made of, wherever it began; None if nobody has it.

        Raises:
            EngineUnavailableError: it cannot be known now.
        """

    async def forget(self, stream_id: str) -> None:
        """Have nobody make the stream again."""


def ids_of(answer_id: str, index: int = 0) -> Random:
    """Draws the ids of what a choice says: if it is made again it has them again."""
    return Random(f"{answer_id}-{index}")


def keep_identity(request: Request, identity: Identity) -> Identity:
    """The identity of the answer to a request: this new one, unless the request is made again."""
    state = request.state
    state.identity = getattr(state, "identity", identity)
    return state.identity  # type: ignore[no-any-return]
