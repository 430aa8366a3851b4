"""How ranks and their engine make sure, before anything else is said, that the other knows their secret.

Each proves it with a digest over what the other has drawn, so that the secret is never sent.  What follows is not
encrypted.
"""

from __future__ import annotations

import hmac
import os
from pathlib import Path
from typing import Literal

from shoal.scheduler.errors import ConfigError
from shoal.server.engine.rank_wire import Challenge, Proof, RankSocket, StrangerError

LEAST_CHARS = 16
NONCE_BYTES = 32

Role = Literal["engine", "rank"]


def read_secret(file: Path | None) -> bytes:
    """The secret in a file; none is as good as an empty one, which everybody knows.

    Raises:
        ConfigError: it cannot be read, or is too short to be one.
    """
    if file is None:
        return b""
    try:
        secret = file.read_text("utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"parallel_secret_file: {file}: {error}", param="parallel_secret_file") from error
    if len(secret) < LEAST_CHARS:
        raise ConfigError(
            f"parallel_secret_file: {file}: a secret must have at least {LEAST_CHARS} characters",
            param="parallel_secret_file",
        )
    return secret.encode()


def acquaint(other: RankSocket, secret: bytes, own_role: Role) -> None:
    """Prove to the other end of a connection that the secret is known here, and have it prove so.

    Raises:
        StrangerError: it does not know it, or is none of ours.
        TimeoutError: it says nothing in the socket's time.
        OSError: it has ended.
    """
    other_role: Role = "rank" if own_role == "engine" else "engine"
    own, its = Challenge(os.urandom(NONCE_BYTES)), None
    other.send(own)
    if not isinstance(its := other.receive(), Challenge):
        raise StrangerError("is none of Shoal's engines and ranks")
    other.send(Proof(_digest(secret, own_role, its.nonce)))
    match other.receive():
        case Proof(digest) if hmac.compare_digest(digest, _digest(secret, other_role, own.nonce)):
            return
    raise StrangerError("does not know the secret of this model's ranks (parallel_secret_file)")


def _digest(secret: bytes, role: Role, nonce: bytes) -> bytes:
    """What who has this role answers to the challenge; one may not answer with what the other has said."""
    return hmac.digest(secret, role.encode() + nonce, "sha256")
