"""Who sends what when, in virtual time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from shoal.loadtest.arrivals import due_times, think_times
from shoal.loadtest.records import Load
from shoal.loadtest.workload import WorkloadRequest

Sending = tuple[float, WorkloadRequest]  # when, what


class Users(Protocol):
    """Those who send the requests of a workload."""

    def begin(self) -> list[Sending]:
        """What is sent whatever comes of it."""
        ...

    def after(self, request_id: str, now: float) -> Sending | None:
        """What follows the end of this request's answer, which is now."""
        ...


class OpenLoop:
    """Implements `Users`: requests are sent when they are due, whatever the server does."""

    def __init__(self, workload: Sequence[WorkloadRequest], load: Load) -> None:
        self._sendings = list(zip(due_times(load, workload), workload, strict=True))

    def begin(self) -> list[Sending]:
        return self._sendings

    def after(self, request_id: str, now: float) -> Sending | None:
        return None


class ClosedLoop:
    """Implements `Users`: each sends the requests of the next session that nobody has taken, one after the other.

    Args:
        turnaround: seconds from an answer's end to the next request, beside the time to think.
    """

    def __init__(self, workload: Sequence[WorkloadRequest], load: Load, turnaround: float) -> None:
        sessions: dict[str, list[WorkloadRequest]] = {}
        for request in workload:
            sessions.setdefault(request.session, []).append(request)
        self._num_users = load.users
        self._turnaround = turnaround
        pauses = think_times(load, len(workload)).tolist()
        self._pauses = {request.request_id: pause for request, pause in zip(workload, pauses, strict=True)}
        self._sessions = iter(sessions.values())
        self._rest: dict[str, Iterator[WorkloadRequest]] = {}  # of its user's session, by the request that is sent

    def begin(self) -> list[Sending]:
        first = [self._next(iter(())) for _ in range(self._num_users)]
        return [(0.0, request) for request in first if request]

    def after(self, request_id: str, now: float) -> Sending | None:
        request = self._next(self._rest.pop(request_id))
        return (now + self._turnaround + self._pauses[request.request_id], request) if request else None

    def _next(self, rest: Iterator[WorkloadRequest]) -> WorkloadRequest | None:
        """What a user sends who has so much left of its session."""
        request = next(rest, None)
        if request is None:
            rest = iter(next(self._sessions, ()))
            request = next(rest, None)
        if request is not None:
            self._rest[request.request_id] = rest
        return request
