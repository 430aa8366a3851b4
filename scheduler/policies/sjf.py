"""Shortest job first."""

from __future__ import annotations

from collections.abc import Collection

from shoal.scheduler.config import PolicyConfig, SchedulerConfig
from shoal.scheduler.output import FinishReason
from shoal.scheduler.policies.policy import KeyedPolicy
from shoal.scheduler.policies.predictor import PREDICTORS, Predictor
from shoal.scheduler.request import Request, RequestStatus

_PROMPT_WEIGHT = 0.1  # tokens of a prompt are computed many at a time, those of an output one by one


class ShortestJobFirst(KeyedPolicy):
    """The least predicted work left goes first and may preempt more; waiting makes up for work.

    Args:
        predictor: foretells the length of a request's output when it arrives.
        ageing_tokens: tokens of work that a second of waiting makes up for.

    Work left is the output that is still expected, and a tenth of the tokens that are known and still to be computed.
    Whoever outlives its prediction is expected to need as much again, and so on; so it has never more left than another
    with the same prediction that has not begun, and the two do not preempt each other in turns.  To be preempted for a
    row costs computing again, so that much more the victim must have left.

    Nobody starves: the order is that of arrival_time + work left / ageing_tokens, and a request's work is never more
    than W, a tenth of its prompt and all of `max_tokens`; so it is not overtaken by any that arrives more than
    W / ageing_tokens seconds after it.
    """

    def __init__(self, predictor: Predictor, ageing_tokens: float) -> None:
        super().__init__()
        self._predictor = predictor
        self._ageing_tokens = ageing_tokens
        self._predicted: dict[Request, float] = {}

    @classmethod
    def create(cls, limits: SchedulerConfig, config: PolicyConfig) -> ShortestJobFirst:
        return cls(PREDICTORS[config.predictor](), config.ageing_tokens)

    def key(self, request: Request) -> float:
        predicted, num_output_tokens = self._predicted[request], request.num_output_tokens
        expected = min(predicted - num_output_tokens % predicted, request.params.max_tokens - num_output_tokens)
        to_compute = _PROMPT_WEIGHT * (request.num_tokens - request.num_computed_tokens)
        return request.arrival_time + (expected + to_compute) / self._ageing_tokens

    def victim(self, request: Request, running: Collection[Request], now: float) -> Request | None:
        victim = super().victim(request, running, now)
        if victim is None or request.status is RequestStatus.RUNNING:
            return victim
        lost = _PROMPT_WEIGHT * victim.num_computed_tokens / self._ageing_tokens
        return victim if self.key(request) + lost < self.key(victim) else None

    def on_arrival(self, request: Request) -> None:
        self._predicted[request] = self._predictor.predict(request)

    def on_finish(self, request: Request, reason: FinishReason) -> None:
        super().on_finish(request, reason)
        del self._predicted[request]
        if reason is not FinishReason.ERROR:  # whoever was aborted wanted no more than it had
            self._predictor.learn(request)
