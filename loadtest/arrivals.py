"""When requests are sent: drawn before a run, so that nothing that a server does can move them."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from shoal.loadtest.errors import LoadTestError
from shoal.loadtest.records import Load
from shoal.loadtest.workload import WorkloadRequest

_ARRIVALS, _PAUSES = 0, 1  # streams of random numbers that are independent of each other


def arrival_times(load: Load, num: int) -> NDArray[np.float64]:
    """When the requests of an open loop are sent, in seconds after its start, ascending.

    The times between arrivals are independent and gamma distributed, with mean 1 / `rate` and the squared coefficient
    of variation `burstiness`.  At 1 they are exponential, and the arrivals a Poisson process; above, they come in
    bursts, as those of public traces do (Wang et al. 2024, "BurstGPT").

    Raises:
        LoadTestError: `rate` or `burstiness` is not a finite number above 0.
    """
    for name, value in (("rate", load.rate), ("burstiness", load.burstiness)):
        if not (isfinite(value) and value > 0):
            raise LoadTestError(f"{name} must be a finite number above 0, not {value}")
    gaps = _random(load, _ARRIVALS).gamma(1 / load.burstiness, load.burstiness / load.rate, num)
    return np.cumsum(gaps)


def think_times(load: Load, num: int) -> NDArray[np.float64]:
    """How long a user of a closed loop pauses before each request of a workload, in seconds; exponential.

    Pause i belongs to request i of the workload, whichever user sends it; a user does not pause before its first one.

    Raises:
        LoadTestError: `think_seconds` is not a finite number of at least 0.
    """
    if not (isfinite(load.think_seconds) and load.think_seconds >= 0):
        raise LoadTestError(f"think_seconds must be a finite number of at least 0, not {load.think_seconds}")
    return _random(load, _PAUSES).exponential(load.think_seconds, num)


def due_times(load: Load, requests: Sequence[WorkloadRequest]) -> list[float]:
    """When an open loop sends each request: at times drawn for its rate, or without one, as the workload says.

    Raises:
        LoadTestError: as `arrival_times`; or there is no rate, and a request without an arrival time.
    """
    if load.rate:
        times: list[float] = arrival_times(load, len(requests)).tolist()
        return times
    recorded = [request.arrival_time for request in requests if request.arrival_time is not None]
    if len(recorded) < len(requests):
        lacking = next(request.request_id for request in requests if request.arrival_time is None)
        raise LoadTestError(
            f"request {lacking!r} of the workload has no arrival_time: without one for each request a load needs "
            "either users or a rate"
        )
    return recorded


def check_load(load: Load, requests: Sequence[WorkloadRequest]) -> None:
    """Refuse a load before anything is sent.

    Raises:
        LoadTestError: naming the field that is out of range.
    """
    for name, value in (("users", load.users), ("seed", load.seed)):
        if value < 0:
            raise LoadTestError(f"{name} must be at least 0, not {value}")
    if load.users and load.rate:
        raise LoadTestError(f"a load has either users or a rate, but these are {load.users} and {load.rate}")
    if load.users:
        think_times(load, 0)
    else:
        due_times(load, requests)


def _random(load: Load, stream: int) -> np.random.Generator:
    return np.random.default_rng([load.seed, stream])
