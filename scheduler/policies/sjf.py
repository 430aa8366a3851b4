"""Shortest job first."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from shoal.scheduler.config import Config, SchedulerConfig, setting
from shoal.scheduler.output import FinishReason
from shoal.scheduler.policies.policy import KeyedPolicy
from shoal.scheduler.policies.predictor import PREDICTORS, Predictor
from shoal.scheduler.request import Request, RequestStatus

_PROMPT_WEIGHT = 0.1  # tokens of a prompt are computed many at a time, those of an output one by one


class ShortestJobFirst(KeyedPolicy):
    """The least predicted work left goes first and may preempt more; waiting makes up for work.

    Args:
        predictor: predicts the length of a request's output when it arrives; by default the one that the knobs name.

    Work left is the output that is still expected, and a tenth of the tokens that are known and still to be computed.
    A request that outlives its prediction is expected to need as much again, and so on.  So it never has more left
    than another one with the same prediction that has not begun, and the two do not preempt each other in turns.  A
    request that is preempted for a row must be computed again: the victim must have that much more work left.

    No request starves: the order is that of arrival_time + work left / ageing_tokens, and a request's work is never
    more than W, a tenth of its prompt and all of `max_tokens`.  So none that arrives more than W / ageing_tokens
    seconds later overtakes it.
    """

    name = "sjf"
    is_steady = False

    @dataclass(frozen=True, kw_only=True)
    class Knobs(Config):
        ageing_tokens: float = setting(
            20.0, above=0, help="For sjf: tokens of predicted work that one second of waiting makes up for."
        )
        predictor: Literal["max_tokens", "learned"] = setting(
            "learned",
            help="For sjf: what predicts the length of an output.  max_tokens takes the request's limit; learned learns"
            " from the requests that end.",
        )

    knobs: Knobs

    def __init__(self, config: SchedulerConfig, knobs: Knobs, predictor: Predictor | None = None) -> None:
        super().__init__(config, knobs)
        self._predictor = predictor or PREDICTORS[knobs.predictor]()
        self._predicted: dict[Request, float] = {}

    def key(self, request: Request) -> float:
        predicted, num_tokens = self._predicted[request], request.num_tokens
        so_far = (num_tokens - request.num_prompt_tokens) % predicted
        expected = min(predicted - so_far, request.max_num_tokens - num_tokens)
        to_compute = _PROMPT_WEIGHT * (num_tokens - request.num_computed_tokens)
        return request.arrival_time + (expected + to_compute) / self.knobs.ageing_tokens

    def victim(self, request: Request, running: Collection[Request], now: float) -> Request | None:
        victim = super().victim(request, running, now)
        if victim is None or request.status is RequestStatus.RUNNING:
            return victim
        lost = _PROMPT_WEIGHT * victim.num_computed_tokens / self.knobs.ageing_tokens
        return victim if self._keys[request] + lost < self._keys[victim] else None

    def on_arrival(self, request: Request) -> None:
        self._predicted[request] = self._predictor.predict(request)

    def on_finish(self, request: Request, reason: FinishReason) -> None:
        super().on_finish(request, reason)
        del self._predicted[request]
        if reason not in (FinishReason.ERROR, FinishReason.INVALID):  # an aborted request wanted no more than it had
            self._predictor.learn(request)
