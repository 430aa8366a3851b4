"""The engine's loop: takes commands, runs steps, sends news."""

from __future__ import annotations

from typing import Protocol

from shoal.scheduler.engine import EngineCore
from shoal.scheduler.errors import ShoalError
from shoal.scheduler.invariants import check_invariants
from shoal.scheduler.output import FinishReason, RequestOutput, SchedulerStats
from shoal.scheduler.request import Request
from shoal.server.engine.endings import Endings
from shoal.server.engine.explaining import WantedSteps
from shoal.server.engine.messages import (
    HEARTBEAT_SECONDS,
    Abort,
    Command,
    EngineRequest,
    ForgetPrefixes,
    News,
    Report,
    Stop,
    Submit,
)


class Wire(Protocol):
    """The engine's end of what joins it to its client."""

    def send(self, report: Report) -> None: ...

    def receive(self, seconds: float | None) -> list[Command]:
        """All commands that have come.  Waits this long for the first, or for ever (None)."""
        ...


class EngineLoop:
    """Feeds an `EngineCore` from a wire, and has requests end where they say."""

    def __init__(self, core: EngineCore, wire: Wire) -> None:
        self.core = core
        self.wire = wire
        self._endings = core.executor = Endings(core.executor)
        self._wanted = WantedSteps(core)
        self._reported: SchedulerStats | None = None
        self._reported_at = 0.0  # on the engine's clock

    def run(self) -> None:
        """Run until a `Stop` comes."""
        while self.turn():
            pass

    def turn(self) -> bool:
        """Wait for something to do, take the commands that have come, run one step, report; False after a `Stop`."""
        now = self.core.clock()
        wake_time = self.core.scheduler.wake_time(now)
        outputs: list[RequestOutput] = []
        for command in self.wire.receive(None if wake_time is None else min(wake_time - now, HEARTBEAT_SECONDS)):
            match command:
                case Submit(requests):
                    outputs += [refusal for request in requests if (refusal := self._add(request))]
                case Abort(request_ids):
                    for request_id in request_ids:
                        self.core.scheduler.abort(request_id)
                        self._endings.forget(request_id)
                    self._reported = None  # the client may wait to hear that nothing is left, even if that is not new
                case ForgetPrefixes():
                    self.core.scheduler.kv_cache.pool.forget()
                case Stop():
                    return False
        outputs += self.core.step()
        for output in outputs:
            if output.finish_reason is not None:
                self._endings.forget(output.request_id)
        stats, now = self.core.scheduler.stats(), self.core.clock()
        step = self._wanted.take()
        if outputs or step or stats != self._reported or now - self._reported_at >= HEARTBEAT_SECONDS:
            self.wire.send(News(outputs, stats, step))
            self._reported, self._reported_at = stats, now
        if self.core.scheduler.num_unfinished == 0:
            check_invariants(self.core.scheduler)
        return True

    def _add(self, sent: EngineRequest) -> RequestOutput | None:
        """Hand a request to the scheduler; what it refuses gets an answer too."""
        request = Request(
            sent.request_id,
            sent.prompt_token_ids,
            sent.params,
            self.core.clock() - sent.age,
            sent.output_token_ids,
            scheduling=sent.scheduling,
            speculates=sent.speculates,
        )
        request.num_scored_tokens = sent.num_scored_tokens
        try:
            self.core.scheduler.add(request, is_bounded=sent.is_bounded)
        except ShoalError as error:
            return RequestOutput(sent.request_id, [], FinishReason.ERROR, error=error.message)
        self._endings.expect(sent)
        self._wanted.expect(sent)
        return None
