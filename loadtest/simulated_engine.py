"""An executor that computes nothing but the time."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from zlib import crc32

from shoal.loadtest.costs import CostModel, StepShape
from shoal.loadtest.workload import WorkloadRequest
from shoal.scheduler.output import ScheduledRequest, SchedulerOutput, StepResult
from shoal.scheduler.scheduler import Scheduler

STOP_TOKEN_ID = -1  # none of a prompt's, whatever the vocabulary
_PLACE_BITS = 24  # more places than any context has


class VirtualClock:
    """Seconds that pass when somebody says so.

    Attributes:
        now: may be set, and never back.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedExecutor:
    """Implements `shoal.scheduler.engine.Executor` with a cost model in place of a model.

    A request's outputs are tokens that depend on its id and their place, so that no two texts meet by accident, and
    the stop token where its text ends.

    Args:
        requests: by request id.
        clock: moved on by what each step costs.
        seed: of the deviations from what the costs predict.

    Attributes:
        shape: of the last step.
    """

    def __init__(
        self,
        requests: Mapping[str, WorkloadRequest],
        costs: CostModel,
        scheduler: Scheduler,
        clock: VirtualClock,
        seed: int,
    ) -> None:
        self._requests = requests
        self._costs = costs
        self._scheduler = scheduler
        self._orders = scheduler.policy.sorts
        self._clock = clock
        self._random = Random(seed)
        self.shape = StepShape()

    def execute(self, output: SchedulerOutput) -> StepResult:
        self.shape = StepShape.of(output, len(self._scheduler.waiting) if self._orders else 0)
        ratios = self._costs.ratios(self.shape.num_streams)
        self._clock.now += self._costs.steps.seconds(self.shape) * (self._random.choice(ratios) if ratios else 1.0)
        return StepResult([[self._choose(share)] if share.samples else [] for share in output.scheduled])

    def _choose(self, share: ScheduledRequest) -> int:
        """The token after the share's last."""
        request = self._requests[share.request_id]
        place = share.num_computed_tokens + share.num_scheduled_tokens - len(request.prompt_token_ids)
        if place + 1 >= request.num_output_tokens:
            return STOP_TOKEN_ID
        return (crc32(share.request_id.encode()) << _PLACE_BITS) + place
