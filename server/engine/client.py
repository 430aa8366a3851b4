"""The API process's side of an engine, wherever that runs: admission, journals, streams of news."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from enum import Enum

from shoal.scheduler.admission import check_queue, check_request
from shoal.scheduler.errors import ShoalError
from shoal.scheduler.output import SchedulerStats
from shoal.server.engine.journal import Submission
from shoal.server.engine.messages import Abort, Command, EngineRequest, News, Ready, Submit
from shoal.server.errors import EngineUnavailableError
from shoal.server.metrics import Metrics

NO_STATS = SchedulerStats(0, 0, 0.0, 0, 0, 0)  # of an engine that has just started, or is no more


class EngineState(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class EngineClient:
    """Implements `Engine`.  The owner of the engine connects it, hands its news over, and says when it is lost.

    Args:
        name: of the engine, for metrics.
        metrics: told of each step and each request's tokens.
    """

    def __init__(self, name: str, metrics: Metrics) -> None:
        self.name = name
        self.state = EngineState.STARTING
        self._metrics = metrics
        self._ready: Ready | None = None
        self._send: Callable[[Command], None] | None = None
        self._unfinished: dict[str, Submission] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.stats(name, NO_STATS)

    # -- for HTTP: see `Engine` ----------------------------------------------------------------------------------

    @property
    def ready(self) -> Ready:
        if self._ready is None or self.state is not EngineState.READY:
            reason = "starting" if self.state is EngineState.STARTING else "shutting down"
            raise EngineUnavailableError(f"the server is {reason}; try again later")
        return self._ready

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    def submit(self, requests: Sequence[EngineRequest]) -> Submission:
        limits = self.ready.limits
        for request in requests:
            check_request(limits, len(request.prompt_token_ids), request.params.max_tokens)
        check_queue(limits, self.num_unfinished, len(requests))
        submission = Submission(requests, self.name, time.monotonic())
        self._unfinished |= dict.fromkeys(submission.journals, submission)
        self._idle.clear()
        self._command(Submit(list(requests)))
        return submission

    def abort(self, request_ids: Iterable[str]) -> None:
        unfinished = [request_id for request_id in request_ids if request_id in self._unfinished]
        for request_id in unfinished:
            self._forget(request_id)
        if unfinished:
            self._command(Abort(unfinished))

    async def drain(self, seconds: float) -> None:
        """Refuse new requests; let the unfinished ones go on for a while, then end them with an error."""
        self.state = EngineState.DRAINING
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        self._fail_all(EngineUnavailableError("the server is shutting down"))

    def close(self) -> None:
        """Refuse new requests, and end the unfinished ones with an error."""
        self.state = EngineState.STOPPED
        self._fail_all(EngineUnavailableError("the server is shutting down"))

    # -- for the owner of the engine ------------------------------------------------------------------------------

    def connect(self, ready: Ready, send: Callable[[Command], None]) -> None:
        """The engine is ready, and takes commands through `send`."""
        self._ready, self._send = ready, send
        if self.state is EngineState.STARTING:
            self.state = EngineState.READY

    def take(self, news: News) -> None:
        """Note what came of a step, and wake the calls that wait for it."""
        now = time.monotonic()
        self._metrics.stats(self.name, news.stats)
        for output in news.outputs:
            submission = self._unfinished.get(output.request_id)
            if submission is not None:
                journal = submission.journals[output.request_id]
                self._metrics.tokens(journal, output, now)
                journal.note(output, now)
                submission.put(output)
                if output.finish_reason is not None:
                    self._forget(output.request_id)

    def lose(self, error: ShoalError) -> None:
        """The engine is gone: its requests end with this error, and it takes no new ones until it is connected."""
        self._send = None
        if self.state is EngineState.READY:
            self.state = EngineState.STARTING
        self._fail_all(error)
        self._metrics.stats(self.name, NO_STATS)

    # -- the parts -----------------------------------------------------------------------------------------------

    def _command(self, command: Command) -> None:
        if self._send is not None:
            self._send(command)

    def _forget(self, request_id: str) -> None:
        del self._unfinished[request_id]
        if not self._unfinished:
            self._idle.set()

    def _fail_all(self, error: ShoalError) -> None:
        for submission in self._unfinished.values():
            submission.fail(error)
        self._unfinished.clear()
        self._idle.set()
