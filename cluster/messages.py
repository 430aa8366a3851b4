"""What engines and API processes say to each other before there are requests; then they speak as on one machine."""

from __future__ import annotations

import msgspec

from shoal.scheduler.output import SchedulerStats
from shoal.server.engine.messages import Loading, News, Ready, Sendable, StartFailed


class Hello(msgspec.Struct, tag=True):
    """An API process is there."""


class Welcome(msgspec.Struct, tag=True):
    """What the engine is.

    Attributes:
        version: of Shoal.
        fingerprint: of the model and of the settings by which other numbers are computed; tokens depend on it.
        stats: what it has counted so far.
    """

    version: str
    fingerprint: str
    ready: Ready
    stats: SchedulerStats


class Endpoint(msgspec.Struct, frozen=True):
    """Where an engine is.

    Attributes:
        replica: that runs it; another engine of the same replica takes the place of this one.
        address: of its socket, such as tcp://10.0.0.7:41234.
        fingerprint: as in `Welcome`.
        number: of the replica, the label of its metrics.
    """

    replica: str
    address: str
    fingerprint: str
    number: int = 0


class Listening(msgspec.Struct, tag=True):
    """The engine process is ready, at this port."""

    port: int
    fingerprint: str


class Load(msgspec.Struct, tag=True, frozen=True):
    """How loaded an engine is.

    Attributes:
        queue_seconds: for how long the oldest of the requests that wait has waited.
        kv_cache_usage: share of blocks owned by requests, 0 to 1.
        num_unfinished: requests that it has.
    """

    queue_seconds: float = 0.0
    kv_cache_usage: float = 0.0
    num_unfinished: int = 0


class Standing(msgspec.Struct, frozen=True):
    """How a replica stands that runs an engine.

    Attributes:
        node: of Ray, on which it is.
        address, fingerprint: of its engine, as in `Endpoint`; None while there is none.
        number: that the directory gave it; None before.
    """

    replica: str
    node: str
    address: str | None = None
    fingerprint: str | None = None
    load: Load = Load()
    number: int | None = None

    @property
    def endpoint(self) -> Endpoint | None:
        if self.address is None or self.fingerprint is None or self.number is None:
            return None
        return Endpoint(self.replica, self.address, self.fingerprint, self.number)


ToEngine = Hello | Sendable
FromEngine = Welcome | News
Report = Loading | StartFailed | Listening | Load  # of an engine process to the replica that runs it
