"""One process's traffic: what is left to send, and the file of what came of it.  Imports nothing of locust."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import gevent
from gevent.event import Event
from gevent.pool import Group
from msgspec import Struct

from shoal.loadtest.arrivals import Arrival, closed_sessions, open_arrivals
from shoal.loadtest.records import Load, RequestRecord, read_lines
from shoal.loadtest.stream import CompletionClient, request_body
from shoal.loadtest.workload import WorkloadRequest


class Traffic:
    """Sends the requests of a workload as a load says.

    In a closed loop each user calls `serve_user`, which takes sessions in the order of the workload.  In an open loop
    `start` sends each request when it is due, whatever the server does, and sessions play no part.

    Args:
        report: is told of each request that has ended, answered or not.
        index, count: of `count` processes that share a load, this is number `index`, and takes every count-th session,
            or request of an open loop.

    Attributes:
        started_at: start of the run, from which all times count, on the monotonic clock.
        finished: set when all requests have ended.

    Raises:
        LoadTestError: the load does not suit the workload.
    """

    def __init__(
        self,
        requests: Sequence[WorkloadRequest],
        load: Load,
        client: CompletionClient,
        report: Callable[[RequestRecord], None],
        *,
        index: int = 0,
        count: int = 1,
    ) -> None:
        self.finished = Event()
        self.started_at = time.monotonic()
        self._client, self._report = client, report
        self._due: list[Arrival] = [] if load.users else list(open_arrivals(load, requests))[index::count]
        self._sessions = deque(closed_sessions(load, requests)[index::count] if load.users else [])
        self._num_left = len(self._due) + sum(map(len, self._sessions))
        self._in_flight = Group()
        if not self._num_left:
            self.finished.set()

    def start(self) -> None:
        """Start the run: all times count from now."""
        self.started_at = time.monotonic()
        self._in_flight.spawn(self._send_when_due)

    def stop(self) -> None:
        """Cut off what an open loop has in flight, and report it.  Locust stops the users of a closed loop."""
        self._in_flight.kill()

    def serve_user(self) -> None:
        """Be a user: send the requests of one session after the other, until none is left."""
        pauses = False
        while self._sessions:
            for pause, request in self._sessions.popleft():
                if pauses:
                    self._sleep_until(self.now() + pause)
                self.send(request)
                pauses = True

    def _send_when_due(self) -> None:
        for due, request in self._due:
            self._sleep_until(due)
            self._in_flight.spawn(self.send, request, due)

    def send(self, request: WorkloadRequest, due: float | None = None) -> None:
        """Send a request and follow its answer to the end.

        Args:
            due: when it was to be sent, from which its latency counts; None is now.
        """
        record = request.record(self.now() if due is None else due)
        try:
            self._client.stream(request_body(request), record, self.now)
        except BaseException as error:  # locust's end of a user is none of the others
            record.error = f"cut off: {error!r}"
            raise
        finally:
            self._report(record)
            self._num_left -= 1
            if not self._num_left:
                self.finished.set()

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started_at

    def _sleep_until(self, seconds: float) -> None:
        """Never too short: gevent counts from when its loop last looked at the clock, which may be a while ago."""
        while (left := seconds - self.now()) > 0:
            gevent.sleep(left)


# -- the results file -------------------------------------------------------------------------------------------------


class Begin(Struct, tag="begin", tag_field="kind"):
    """First line: start of the run on the machine's monotonic clock, which is that of the engine's trace."""

    started_at: float


class End(Struct, tag="end", tag_field="kind"):
    """Last line: processor time of the load generator since the start."""

    cpu_seconds: float


class Results(NamedTuple):
    """What a load generator measured; the records are in the order in which requests were sent."""

    records: list[RequestRecord]
    started_at: float = 0.0
    cpu_seconds: float = 0.0


def read_results(path: Path) -> Results:
    """Read a results file, whole or cut off at any place; raises LoadTestError if a line of it is broken."""
    lines = list(read_lines(path, Begin | RequestRecord | End, may_be_cut=True))
    records = sorted((line for line in lines if isinstance(line, RequestRecord)), key=lambda record: record.sent_at)
    started_at = sum(line.started_at for line in lines if isinstance(line, Begin))
    return Results(records, started_at, sum(line.cpu_seconds for line in lines if isinstance(line, End)))
