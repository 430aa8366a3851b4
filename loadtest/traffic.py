"""One run of a load on a server: what is left to send, and how it is sent.  Imports nothing of locust."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gevent
from gevent.event import Event
from gevent.pool import Group

from shoal.loadtest.arrivals import check_load, due_times, think_times
from shoal.loadtest.records import Load, RequestRecord
from shoal.loadtest.stream import CompletionClient, is_connection_error
from shoal.loadtest.workload import WorkloadRequest

CUT_OFF = "cut off: the run ended before the answer"
# So many requests in a row that found no server mean that there is none any more.
MAX_CONNECTION_ERRORS = 16


@dataclass(frozen=True, slots=True)
class Share:
    """One load generator's part of a load: of `count` that share it, this is number `index` and takes every count-th
    session of a closed loop, or request of an open one."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class _Planned:
    """A request, and its time: the pause before it in a closed loop, when it is due in an open one."""

    request: WorkloadRequest
    seconds: float


class Traffic:
    """Sends the requests of a workload as a load says.

    In a closed loop users ask for sessions (`next_session`) in the order of the workload, and send their requests one
    after the other.  In an open loop `dispatch` sends each request when it is due, and sessions play no part: whatever
    the server does, nobody waits for it.

    Args:
        report: is told of each request that has ended, answered or not.

    Attributes:
        is_open: whether the loop is open.
        finished: set when all requests have ended, or there is no server any more.

    Raises:
        LoadTestError: the load is out of range.
    """

    def __init__(
        self,
        requests: Sequence[WorkloadRequest],
        load: Load,
        client: CompletionClient,
        report: Callable[[RequestRecord], None],
        share: Share = Share(),
    ) -> None:
        check_load(load, requests)
        self.is_open = not load.users
        self.finished = Event()
        self.started_at = time.monotonic()
        self._client = client
        self._report = report
        self._sessions: deque[list[_Planned]] = deque()
        self._due: list[_Planned] = []
        if self.is_open:
            due = zip(requests, due_times(load, requests), strict=True)
            self._due = [_Planned(*one) for one in sorted(due, key=lambda one: one[1])][share.index :: share.count]
        else:
            self._sessions.extend(_sessions(requests, load)[share.index :: share.count])
        self._num_left = len(self._due) + sum(map(len, self._sessions))
        self._num_connection_errors = 0
        self._in_flight = Group()
        if not self._num_left:
            self.finished.set()

    def start(self) -> None:
        """The run starts now; all times count from here."""
        self.started_at = time.monotonic()
        if self.is_open:
            self._in_flight.spawn(self._dispatch)

    def stop(self) -> None:
        """Cut off what an open loop has in flight; it is reported.  Users of a closed loop are stopped by locust."""
        self._in_flight.kill()

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started_at

    def _sleep_until(self, seconds: float) -> None:
        """Not a moment less: gevent counts from when its loop last looked at the clock, which may be a while ago."""
        while (left := seconds - self.now()) > 0:
            gevent.sleep(left)

    # -- closed loop -------------------------------------------------------------------------------------------------

    def serve_next_session(self, *, is_first: bool) -> bool:
        """Take the next session and send its requests, each after the answer to the one before; False if there is none.

        A user that is stopped in the middle leaves the rest of its session to the others.

        Args:
            is_first: whether it is the first one of its user, who does not pause before it.
        """
        if not self._sessions or self.finished.is_set():
            return False
        session = deque(self._sessions.popleft())
        try:
            while session and not self.finished.is_set():
                if not is_first:
                    self._sleep_until(self.now() + session[0].seconds)
                is_first = False
                self.send(session.popleft().request)
        finally:
            if session:
                self._sessions.appendleft(list(session))
        return True

    # -- open loop ---------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        for planned in self._due:
            self._sleep_until(planned.seconds)
            if self.finished.is_set():
                break
            self._in_flight.spawn(self.send, planned.request, planned.seconds)

    # -- both --------------------------------------------------------------------------------------------------------

    def send(self, request: WorkloadRequest, due: float | None = None) -> None:
        """Send a request and follow its answer to the end.

        Args:
            due: from when its latency counts, if it was to be sent at a certain time.
        """
        sent_at = self.now() if due is None else due
        record = RequestRecord(request_id=request.request_id, client=request.client, sent_at=sent_at)
        try:
            self._client.stream(request, record, self.now)
        except gevent.GreenletExit:
            record.error = CUT_OFF
            raise
        except BaseException as error:
            record.error = f"the load generator failed: {error!r}"
            raise
        finally:
            self._note(record)

    def _note(self, record: RequestRecord) -> None:
        self._report(record)
        self._num_left -= 1
        self._num_connection_errors = self._num_connection_errors + 1 if is_connection_error(record) else 0
        if not self._num_left or self._num_connection_errors >= MAX_CONNECTION_ERRORS:
            self.finished.set()


def _sessions(requests: Sequence[WorkloadRequest], load: Load) -> list[list[_Planned]]:
    """In the order in which they begin in the workload."""
    pauses: list[float] = think_times(load, len(requests)).tolist()
    sessions: dict[str, list[_Planned]] = {}
    for request, pause in zip(requests, pauses, strict=True):
        sessions.setdefault(request.session, []).append(_Planned(request, pause))
    return list(sessions.values())
