"""The API process's side of an engine, wherever that runs: admission, journals, streams of news."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from enum import Enum
from math import inf

from shoal.scheduler.errors import EngineError, ShoalError
from shoal.scheduler.output import RequestOutput, SchedulerStats
from shoal.server.engine.admission import Admission
from shoal.server.engine.event_log import EventLog
from shoal.server.engine.explaining import tell_histories
from shoal.server.engine.journal import Journal
from shoal.server.engine.messages import Abort, EngineRequest, ForgetPrefixes, News, Ready, Sendable, Submit
from shoal.server.engine.submission import Submission
from shoal.server.errors import EngineUnavailableError
from shoal.server.metrics import NO_STATS, Metrics

MAX_DEATHS = 3  # of engines with a request that makes no progress, before it is tried alone


class EngineState(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class EngineClient:
    """Implements `Engine`.  The owner of the engine connects it, hands its news over, and says when it is lost.

    A request outlives its engine: what is unfinished when an engine is lost is submitted to the next one, with the
    tokens that came already.  A request that was there at three deaths in a row without any progress may be what kills
    engines.  So it is tried alone, until its first news or the next death, with which it ends.

    Args:
        name: of the engine, for metrics.
        metrics: told of each step and each request's tokens.
        hang_seconds: an engine hangs if it has work and was not heard of for so long.
        clock: returns seconds.
    """

    def __init__(
        self, name: str, metrics: Metrics, *, hang_seconds: float = inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.state = EngineState.STARTING
        self.admission = Admission()  # another one has bounds
        self.is_retired = False  # see `retire`
        self.names_all = True  # whether histories name the requests of other clients
        self.events = EventLog()
        self.changed: Callable[[Ready | None], None] = lambda ready: None  # told when it is connected, lost, given up
        self._metrics = metrics
        self._hang_seconds = hang_seconds
        self._clock = clock
        self._ready: Ready | None = None
        self._send: Callable[[Sendable], None] | None = None
        self._unfinished: dict[str, Submission] = {}
        self._held: dict[str, None] = {}  # ids of unfinished requests that no engine has, in order
        self._on_trial: str | None = None
        self._num_reported = 0  # requests that the engine spoke of last
        self._recalled = False  # whether the engine may still speak of one that was tried before
        self._untold: dict[Submission, None] = {}  # that have outputs and were not told yet
        self._telling: asyncio.Handle | None = None
        self._heard_at = self._lost_at = clock()
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.lost(name)

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

    def journals(self) -> list[Journal]:
        return [submission.journals[request_id] for request_id, submission in self._unfinished.items()]

    def check_health(self) -> None:
        self.ready  # noqa: B018 (raises)
        if self._send is None or self.hangs:
            raise EngineUnavailableError("the engine is being replaced; requests wait for the next one")

    def check_room(self, requests: Sequence[EngineRequest] = (), timeout: float = inf) -> None:
        self.admission.note(self._clock(), self._num_in_engine)
        self.admission.check(self.ready.limits, self.journals(), requests, timeout)

    def submit(self, requests: Sequence[EngineRequest], timeout: float = inf) -> Submission:
        self.check_room(requests, timeout)
        submission = Submission(requests, self._clock())
        submission.end_after(timeout, self.abort)
        self.adopt(dict.fromkeys(submission.journals, submission), are_new=True)
        return submission

    def forget_prefixes(self) -> None:
        if self._send is not None:  # else the next engine begins without any
            self._send(ForgetPrefixes())

    def abort(self, request_ids: Iterable[str]) -> None:
        unfinished = [request_id for request_id in request_ids if request_id in self._unfinished]
        sent = [request_id for request_id in unfinished if request_id not in self._held]
        for request_id in unfinished:
            self._forget(request_id)
        if sent and self._send is not None:
            self._send(Abort(sent))
        self._end_trial(is_idle=False)

    async def drain(self, seconds: float) -> None:
        """Refuse new requests; let the unfinished ones go on for a while, then end them with an error."""
        self.state = EngineState.DRAINING
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        self._fail_all(EngineUnavailableError("the server is shutting down"))

    def close(self) -> None:
        """Refuse new requests, and end the unfinished ones with an error."""
        self.state = EngineState.STOPPED
        self._fail_all(EngineUnavailableError("the server is shutting down"))

    # -- for a router: see `Router` --------------------------------------------------------------------------------

    @property
    def load(self) -> int:
        """Unfinished requests, of others who share the engine too."""
        return max(len(self._unfinished), self._num_reported)

    @property
    def is_connected(self) -> bool:
        return self._send is not None

    @property
    def is_open(self) -> bool:
        """Whether what is adopted goes to an engine at once."""
        return self.is_connected and self._on_trial is None

    def has_any(self, request_ids: Iterable[str]) -> bool:
        return not self._unfinished.keys().isdisjoint(request_ids)

    def adopt(self, requests: Mapping[str, Submission], *, are_new: bool = False) -> None:
        """Have these requests served, whatever the bounds; for new ones the engine may still have no room."""
        if not self._num_in_engine:
            self._heard_at = self._clock()  # an idle engine is silent
        for request_id, submission in requests.items():
            submission.journals[request_id].engine = self.name
        self._unfinished |= requests
        self._held |= dict.fromkeys(requests)
        if requests:
            self._idle.clear()
        self._hand_over(requests if are_new else ())

    def let_go(self, *, of_suspects: bool = False) -> dict[str, Submission]:
        """Forget the requests that no engine has.  Suspects stay to be tried alone, unless they are meant too."""
        going = [one for one in self._held if of_suspects or self._journal(one).num_deaths < MAX_DEATHS]
        for request_id in going:
            del self._held[request_id]
        requests = {request_id: self._unfinished.pop(request_id) for request_id in going}
        if not self._unfinished:
            self._idle.set()
        return requests

    # -- for the owner of the engine ------------------------------------------------------------------------------

    @property
    def hangs(self) -> bool:
        """Whether an engine that has work, or has to tell that a trial is over, was not heard of for too long."""
        owes_news = self._num_in_engine > 0 or self._on_trial is not None
        return owes_news and self._clock() - self._heard_at > self._hang_seconds

    def connect(self, ready: Ready, send: Callable[[Sendable], None], stats: SchedulerStats = NO_STATS) -> None:
        """The engine is ready, takes commands through `send`, and has counted so much before."""
        self._heard_at = now = self._clock()
        if self._ready is not None:
            self._metrics.restarted(self.name, len(self._held), now - self._lost_at)
        self._metrics.connected(self.name, ready, stats)
        self._ready, self._send, self.is_retired = ready, send, False
        self.admission.begin(ready.limits, now)
        self.events.connect(ready, send)
        if self.state is EngineState.STARTING:
            self.state = EngineState.READY
        self._hand_over()
        self.changed(ready)

    def take(self, news: News) -> None:
        """Note what came of a step.  The calls are told as soon as all that has come is noted."""
        self._heard_at = now = self._clock()
        self._num_reported = news.stats.num_running + news.stats.num_waiting
        self._metrics.stats(self.name, news.stats)
        num_tokens = sum(len(output.token_ids) or (output.embedding is not None) for output in news.outputs)
        self.admission.note(now, self._num_in_engine, num_tokens)
        if news.step is not None:
            tell_histories(news.step, self._unfinished, names_all=self.names_all)
        told: list[tuple[Journal, RequestOutput]] = []
        for output in news.outputs:
            submission = self._unfinished.get(output.request_id)
            if submission is not None and output.request_id not in self._held:
                told.append((submission.journals[output.request_id], output))
                self._untold[submission] = None
                submission.put(output)
        self._metrics.tokens(self.name, told, now)
        for journal, output in told:
            journal.note(output, now)
            if output.finish_reason is not None:
                self._forget(output.request_id)
        self._end_trial(is_idle=not self._num_reported)
        if self._untold and self._telling is None:
            self._telling = asyncio.get_running_loop().call_soon(self._tell)

    def lose(self) -> None:
        """The engine is gone: its requests wait for the next one."""
        self._send, self._lost_at = None, self._clock()
        suspect, self._on_trial, self._recalled = self._on_trial, None, False
        for request_id in self._unfinished.keys() - self._held.keys():
            self._journal(request_id).num_deaths += 1
        if suspect in self._unfinished:
            num_tries = self._journal(suspect).num_deaths
            error = EngineError(f"the engine died each of {num_tries} times that it worked on this request")
            self._unfinished[suspect].fail(error)
            self._forget(suspect)
        self._held = dict.fromkeys(self._unfinished)
        self._num_reported = 0
        self._metrics.lost(self.name)
        self.events.lose()
        self.changed(None)

    def retire(self) -> None:
        """No other engine may come here: what waits for one, suspects too, goes where there are engines."""
        self.is_retired = True
        self.changed(None)

    def give_up(self, error: ShoalError) -> None:
        """No engine can be had: all requests end with this error, and no new ones are taken until one is connected."""
        self._send = None
        if self.state is EngineState.READY:
            self.state = EngineState.STARTING
        self.changed(None)
        self._fail_all(error)

    # -- the parts -----------------------------------------------------------------------------------------------

    @property
    def _num_in_engine(self) -> int:
        return len(self._unfinished) - len(self._held)

    def _journal(self, request_id: str) -> Journal:
        return self._unfinished[request_id].journals[request_id]

    def _hand_over(self, new: Container[str] = ()) -> None:
        """Submit what is held; of suspects the first one, alone."""
        if self._send is None or self._on_trial is not None:
            return
        suspects = (one for one in self._held if self._journal(one).num_deaths >= MAX_DEATHS)
        self._on_trial = next(suspects, None)
        going = list(self._held) if self._on_trial is None else [self._on_trial]
        for request_id in going:
            del self._held[request_id]
        if going:
            now = self._clock()
            self._send(Submit([self._journal(one).resumed(now, is_bounded=one in new) for one in going]))

    def _end_trial(self, *, is_idle: bool) -> None:
        """If the request that is tried alone has got on, or is gone, go on with the others.

        While other suspects are left it leaves the engine for their trials.  It comes back after the news of the last
        trial, or that the engine is idle, before which all that the engine still said of it was dropped.
        """
        suspect = self._on_trial
        is_gone = suspect not in self._unfinished
        if suspect is None or (self._recalled and not is_idle if is_gone else self._journal(suspect).num_deaths):
            return
        self._on_trial, self._recalled = None, False
        others = any(self._journal(request_id).num_deaths >= MAX_DEATHS for request_id in self._held)
        if others and suspect in self._unfinished and self._send is not None:
            self._send(Abort([suspect]))
            self._held[suspect], self._recalled = None, True
        self._hand_over()
        if self.is_open:
            self.changed(self._ready)  # what waited elsewhere may come

    def _tell(self) -> None:
        told, self._untold, self._telling = self._untold, {}, None
        for submission in told:
            submission.announce()

    def _forget(self, request_id: str) -> None:
        self.admission.note_end(self._journal(request_id))
        del self._unfinished[request_id]
        self._held.pop(request_id, None)
        if not self._unfinished:
            self._idle.set()

    def _fail_all(self, error: ShoalError) -> None:
        for submission in self._unfinished.values():
            submission.fail(error)
        self._unfinished.clear()
        self._held.clear()
        self._on_trial = None
        self._idle.set()
