"""When each request is sent: drawn before a run, for locust and for the twin, so that no server can change it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np
from msgspec.structs import replace

from shoal.loadtest.records import Load, LoadTestError
from shoal.loadtest.workload import WorkloadRequest

_APART = 1_000_003  # the tokens of a copy from those of the next: more than a vocabulary has


class Arrival(NamedTuple):
    """A request and its time: open loop, seconds after the start; closed loop, the pause before it."""

    seconds: float
    request: WorkloadRequest


def open_arrivals(load: Load, requests: Sequence[WorkloadRequest]) -> Iterator[Arrival]:
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
        return map(Arrival, np.cumsum(gaps).tolist(), requests)
    times: list[float] = []
    for request in requests:
        if request.arrival_time is None:
            raise LoadTestError(f"request {request.request_id!r} has no arrival_time; a load needs users or a rate")
        times.append(request.arrival_time)
    return (Arrival(times[place], requests[place]) for place in sorted(range(len(times)), key=times.__getitem__))


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


class Copies(Sequence[WorkloadRequest]):
    """A workload as often as it takes for a number of requests: its first request of each copy, then its second, ...

    Requests share their prompts' prefixes with those of their own copy, and not with others.  Each is made when it is
    asked for, because a million prompts fill a memory.
    """

    def __init__(self, requests: Sequence[WorkloadRequest], num_requests: int) -> None:
        self._requests, self._num_requests = requests, num_requests
        self._num_copies = -(-num_requests // len(requests))

    def __len__(self) -> int:
        return self._num_requests

    @overload
    def __getitem__(self, place: int) -> WorkloadRequest: ...

    @overload
    def __getitem__(self, place: slice) -> list[WorkloadRequest]: ...

    def __getitem__(self, place: int | slice) -> WorkloadRequest | list[WorkloadRequest]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(self._num_requests))]
        if place >= self._num_requests:
            raise IndexError
        own, copy = divmod(place, self._num_copies)
        request, apart = self._requests[own], copy * _APART
        return replace(
            request,
            request_id=f"{request.request_id}-{copy}",
            session=f"{request.session}-{copy}",
            prompt_token_ids=[(token_id + apart) % 2**31 for token_id in request.prompt_token_ids],
        )
