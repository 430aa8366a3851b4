"""How those who watch an engine learn of its steps: the engine's end.  Until somebody looks it does nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shoal.model.backends.observed import Observed
from shoal.scheduler.config import Config
from shoal.scheduler.engine import EngineCore, Executor
from shoal.scheduler.output import SchedulerOutput, StepResult
from shoal.scheduler.policies import POLICIES
from shoal.scheduler.step_record import StepRecord
from shoal.server.engine.events import Parts, Seen, UsePolicy, UsesPolicy, Watch
from shoal.server.engine.loop import Wire
from shoal.server.engine.messages import Command, Report
from shoal.server.engine.picture import Picture

EVENT_SECONDS = 0.04  # between two events: as many as an eye takes
MOST_SHARE = 0.01  # of the engine's time that events may take; where they take longer, they are fewer
SLOW_SECONDS = 0.5  # between two events with what changes slowly: block tables and the loads of experts

_encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class _Since:
    """What happened since the last event."""

    num_output_tokens: int = 0
    joined: list[str] = field(default_factory=list)
    preempted: dict[str, str] = field(default_factory=dict)


class Watching:
    """A wire around another that tells, while somebody watches, of the engine's steps: an observer of an `EngineCore`.

    It observes only those steps of which there is to be an event.  What must not be missed between them (who joined,
    who was preempted for whom, how many tokens were chosen) it reads from the schedules, as an executor around the
    executor.  Both are taken away again when nobody watches any more.

    It is made before anything else puts an executor around that of the core.

    Args:
        knobs: of the policies, by their names.
        clock: of the engine.
    """

    def __init__(
        self,
        wire: Wire,
        core: EngineCore,
        knobs: Mapping[str, Config],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._wire = wire
        self._core = core
        self._knobs = knobs
        self._clock = clock
        self._innermost: Any = core.executor
        self._around: Executor | None = None  # the executor that was there before
        self._picture = Picture(core.scheduler)
        self._since = _Since()
        self._present: set[str] = set()  # ids of requests that joined the batch and were not told to have left
        self._record: StepRecord | None = None
        self._timed = _Timed()
        self._execute_began = self._send_seconds = 0.0
        self._num_singly = 0  # steps that are still told of one by one
        self._is_observing = False
        self._is_told = True  # whether the last event tells how the engine stands
        self._told_at = self._due_at = self._slowly_at = self._received_at = 0.0
        self._next_policy = ""

    # -- the wire ------------------------------------------------------------------------------------------------

    def send(self, report: Report) -> None:
        began = self._clock()
        self._wire.send(report)
        self._send_seconds = self._clock() - began

    def receive(self, seconds: float | None) -> list[Command]:
        if self._around is not None:
            seconds = self._look(seconds)
        commands = [command for command in self._wire.receive(seconds) if not self._takes(command)]
        self._is_told = self._is_told and not commands
        if self._around is not None:
            now = self._clock()
            # A step is observed if an event will be due at its end, when it takes as long as the one before.
            ends_at = now + (now - self._received_at if seconds == 0 else 0.0)
            self._received_at = now
            self._observe(self._num_singly > 0 or ends_at >= self._due_at)
        if self._next_policy and not self._core.scheduler.num_unfinished:
            self._use_policy(self._next_policy)
        return commands

    def _takes(self, command: Command) -> bool:
        match command:
            case Watch(is_on, num_steps):
                self._num_singly = num_steps
                if is_on != (self._around is not None):
                    self._begin() if is_on else self._end()
            case UsePolicy(policy):
                self._next_policy = policy
            case _:
                return False
        return True

    def _use_policy(self, policy: str) -> None:
        scheduler, is_watched = self._core.scheduler, self._around is not None
        if is_watched:
            self._picture.end()
        scheduler.use(POLICIES[policy](scheduler.config, self._knobs[policy]))
        if is_watched:
            self._picture.begin()
        self._next_policy, self._is_told = "", False
        self._wire.send(UsesPolicy(policy))

    # -- the executor --------------------------------------------------------------------------------------------

    def execute(self, output: SchedulerOutput) -> StepResult:
        """Have a step computed, and note what of it must not be missed."""
        assert self._around is not None
        if output.preempted:
            self._since.preempted |= output.preempted
            self._picture.note_preempted(output.preempted)
        joined = [share.request_id for share in output.scheduled if share.new is not None]
        if joined:
            self._since.joined += joined
            self._present.update(joined)
        self._is_told = False
        if self._is_observing:
            self._picture.note_step(output.scheduled, self._core.clock())
        self._execute_began = self._clock()
        result = self._around.execute(output)
        self._since.num_output_tokens += sum(map(len, result.token_ids))
        return result

    # -- the observer --------------------------------------------------------------------------------------------

    def __call__(self, record: StepRecord) -> None:
        self._record = record

    def _look(self, seconds: float | None) -> float | None:
        """Between two steps: tell of the last, if it was observed, or of how an idle engine stands.

        Returns:
            How long to wait for commands, when it may be `seconds`.
        """
        now = self._clock()
        if self._record is not None or (seconds != 0 and not self._is_told and now >= self._due_at):
            self._tell(now)
        if self._is_told:
            return seconds
        left = max(self._due_at - now, 0.001)
        return left if seconds is None else min(seconds, left)

    def _tell(self, now: float) -> None:
        """Send an event."""
        began = time.thread_time()
        record, self._record = self._record, None
        since, self._since = self._since, _Since()
        is_slow = now >= self._slowly_at
        event = self._picture.draw(self._core.clock(), record, is_whole=is_slow)
        event.seconds, event.parts = now - self._told_at, self._parts(record)
        event.num_output_tokens, event.preempted = since.num_output_tokens, since.preempted
        event.joined, event.left = since.joined, self._take_gone()
        if is_slow:
            self._slowly_at = now + SLOW_SECONDS
            rows = self._timed.observed.expert_rows if self._timed.observed else None
            if rows is not None:
                event.experts = rows.tolist()
                rows[:] = 0
        self._wire.send(Seen(_encode(event)))
        self._is_told, self._told_at = True, now
        self._num_singly = max(self._num_singly - 1, 0)
        self._due_at = now + max(EVENT_SECONDS, (time.thread_time() - began) / MOST_SHARE)

    def _take_gone(self) -> list[str]:
        """Requests that have left the batch for good since the last event."""
        scheduler = self._core.scheduler
        there = scheduler.running.keys() | scheduler.waiting.keys() | scheduler.padding.keys()
        gone = sorted(self._present - there)
        self._present.difference_update(gone)
        return gone

    def _parts(self, record: StepRecord | None) -> Parts | None:
        """How long the parts of an observed step took."""
        if record is None or not record.shares:
            return None
        timed = self._timed
        build = computed = sample = 0.0
        if timed.ended > self._execute_began:
            build, computed = timed.began - self._execute_began, timed.ended - timed.began
            sample = timed.sample_seconds
        propose = max(record.execute_seconds - build - computed, 0.0)
        return Parts(
            schedule=record.schedule_seconds,
            build=build,
            forward=computed - sample,
            sample=sample,
            propose=propose,
            update=record.update_seconds,
            send=self._send_seconds,
        )

    def _observe(self, is_observed: bool) -> None:
        """Observe the next step, or do not."""
        self._is_observing = is_observed
        observers = [observer for observer in self._core.observers if observer is not self]
        self._core.observers = [*observers, self] if is_observed else observers
        if self._timed.backend is not None:
            self._innermost.backend = self._timed if is_observed else self._timed.backend

    # -- the begin and the end -----------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._around, self._core.executor = self._core.executor, self
        backend = getattr(self._innermost, "backend", None)
        observe = getattr(backend, "observe", None)
        self._timed = _Timed(backend, observe(is_observed=True) if observe else None)
        self._picture.begin()
        self._since, self._record, self._is_told = _Since(), None, False
        self._present = set(self._core.scheduler.running)
        self._told_at = self._due_at = self._slowly_at = self._received_at = self._clock()

    def _end(self) -> None:
        assert self._around is not None
        self._observe(False)
        self._core.executor, self._around = self._around, None
        if self._timed.observed is not None:
            self._timed.backend.observe(is_observed=False)
        self._timed = _Timed()
        self._picture.end()


class _Timed:
    """A backend around another that notes when a step's computation began and ended, and the part of sampling."""

    def __init__(self, backend: Any = None, observed: Observed | None = None) -> None:
        self.backend = backend
        self.observed = observed
        self.began = self.ended = self.sample_seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def execute(self, *arguments: Any) -> Any:
        if self.observed:
            self.observed.sample_seconds[:] = 0
        self.began = time.perf_counter()
        result = self.backend.execute(*arguments)
        self.ended = time.perf_counter()
        if self.observed:
            self.sample_seconds = float(self.observed.sample_seconds[0])
        return result
