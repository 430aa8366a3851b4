"""When each request is sent: drawn before a run, for locust and for the twin, so that no server can change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from shoal.loadtest.records import Load, LoadTestError
from shoal.loadtest.workload import WorkloadRequest


class Arrival(NamedTuple):
    """A request and its time: open loop, seconds after the start; closed loop, the pause before it."""

    seconds: float
    request: WorkloadRequest


def open_arrivals(load: Load, requests: Sequence[WorkloadRequest]) -> list[Arrival]:
    """The requests of an open loop in the order in which they are due.

    The times between arrivals are independent and gamma distributed, with the mean 1 / `rate` and the squared
    coefficient of variation `burstiness`.  At 1 they are exponential, and the arrivals are a Poisson process; above 1
    they come in bursts, as those of public traces do (Wang et al. 2024, "BurstGPT").  Without a rate, requests are due
    at their `arrival_time`.

    Raises:
        LoadTestError: there is no rate, and a request has no arrival time.
    """
    if load.rate:
        random = np.random.default_rng([load.seed, 0])
        gaps = random.gamma(1 / load.burstiness, load.burstiness / load.rate, len(requests))
        return list(map(Arrival, np.cumsum(gaps).tolist(), requests))
    for request in requests:
        if request.arrival_time is None:
            raise LoadTestError(f"request {request.request_id!r} has no arrival_time; a load needs users or a rate")
    recorded = [Arrival(request.arrival_time or 0.0, request) for request in requests]
    return sorted(recorded, key=lambda arrival: arrival.seconds)


def closed_sessions(load: Load, requests: Sequence[WorkloadRequest]) -> list[list[Arrival]]:
    """The sessions of a workload, in the order in which they begin; users take them one after the other.

    A request has its pause whichever user sends it; users do not pause before the very first request that they send.
    """
    random = np.random.default_rng([load.seed, 1])  # independent of that of arrivals
    pauses = random.exponential(load.think_seconds, len(requests)).tolist()
    sessions: dict[str, list[Arrival]] = {}
    for request, pause in zip(requests, pauses, strict=True):
        sessions.setdefault(request.session, []).append(Arrival(pause, request))
    return list(sessions.values())
