"""The loop's body: schedule, execute, update."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from shoal.scheduler.output import RequestOutput, SchedulerOutput, StepResult
from shoal.scheduler.scheduler import Scheduler
from shoal.scheduler.step_record import StepRecord, StepRecorder

logger = logging.getLogger("shoal.engine")


class Executor(Protocol):
    """Computes steps: the real model, the simulator's cost model, or a scripted fake."""

    def execute(self, output: SchedulerOutput) -> StepResult:
        """Compute a step.

        If this raises, the `scheduled` requests of the same step may be given again, one by one.
        """
        ...


class EngineCore:
    """One engine: a scheduler, an executor and a clock.  Nothing else differs between server, simulator and tests.

    Args:
        clock: returns seconds; monotonic in the server, virtual elsewhere.
        observers: each is called with the record of every step when the step is over.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        clock: Callable[[], float],
        observers: Sequence[Callable[[StepRecord], None]] = (),
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.clock = clock
        self.observers = observers
        self._recorder = StepRecorder(scheduler)

    def step(self) -> list[RequestOutput]:
        """Run one step; returns the news of each request that has any."""
        started_at = self.clock()
        output = self.scheduler.schedule(started_at)
        if not output.scheduled and not output.released:
            return []
        if not self.observers:
            return self._compute(output)[0]
        record = self._recorder.begin(output, started_at)
        scheduled_at = self.clock()
        news, executed_at = self._compute(output)
        self._recorder.end(record, news, (scheduled_at, executed_at, self.clock()))
        for observe in self.observers:
            observe(record)
        return news

    def _compute(self, output: SchedulerOutput) -> tuple[list[RequestOutput], float]:
        """Execute and update; returns the news, and when the execution was over."""
        try:
            result = self.executor.execute(output)
        except Exception:
            logger.exception("a step of %d requests failed; trying each alone", len(output.scheduled))
            return self._step_one_by_one(output), self.clock()
        executed_at = self.clock()
        return self.scheduler.update(output, result, executed_at), executed_at

    def _step_one_by_one(self, output: SchedulerOutput) -> list[RequestOutput]:
        """After a failed step: compute each share alone, so that only the requests at fault end with an error."""
        news: list[RequestOutput] = []
        released = output.released
        for share in output.scheduled:
            part, released = SchedulerOutput([share], released), []
            try:
                result = self.executor.execute(part)
            except Exception as error:
                news += self.scheduler.fail(share.request_id, f"{type(error).__name__}: {error}")
            else:
                news += self.scheduler.update(part, result, self.clock())
        return news
