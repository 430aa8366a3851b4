"""One secret that all processes of a cluster share, as the keys of CurveZMQ."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import zmq
from zmq.utils import z85

from shoal.scheduler.errors import ConfigError

LEAST_CHARS = 16


@dataclass(frozen=True)
class Keys:
    """Two key pairs, of all engines and of all API processes.

    They are made of the secret and neither public key is ever sent or told, so that whoever can open a connection knows
    the secret: an engine answers only to those who know its public key.
    """

    engine: tuple[bytes, bytes]
    api: tuple[bytes, bytes]

    @classmethod
    def of(cls, secret: str) -> Keys:
        """Make the keys of a secret.

        Raises:
            ConfigError: it is too short to be one.
        """
        if len(secret) < LEAST_CHARS:
            raise ConfigError(f"the cluster's secret must have at least {LEAST_CHARS} characters", param="secret")
        return cls(_pair(secret, b"engine"), _pair(secret, b"api"))

    def guard_engine(self, socket: zmq.Socket[bytes]) -> None:
        """Have the socket of an engine take connections of those who know the secret, and encrypt them."""
        socket.curve_publickey, socket.curve_secretkey = self.engine
        socket.curve_server = True

    def guard_api(self, socket: zmq.Socket[bytes]) -> None:
        """Have the socket of an API process connect only to those who know the secret."""
        socket.curve_publickey, socket.curve_secretkey = self.api
        socket.curve_serverkey = self.engine[0]


def _pair(secret: str, whose: bytes) -> tuple[bytes, bytes]:
    """A public and a secret key, as CurveZMQ writes them."""
    secret_key = z85.encode(blake2b(secret.encode(), digest_size=32, person=whose).digest())
    return zmq.curve_public(secret_key), secret_key
