"""An executor that computes nothing but the time, and what it saw of the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from random import Random
from zlib import crc32

from shoal.loadtest.costs import CostModel, StepShape
from shoal.loadtest.steps import EngineRequest, Row, Step
from shoal.loadtest.workload import WorkloadRequest
from shoal.scheduler.output import ScheduledRequest, SchedulerOutput, StepResult
from shoal.scheduler.scheduler import Scheduler
from shoal.scheduler.trace import StepRecord

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


class StepLog:
    """The steps of an engine as plain data: the observer to give to an `EngineCore`.

    Attributes:
        requests: by id, those that joined the batch.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.requests: dict[str, EngineRequest] = {}
        self._rows: dict[str, Row] = {}  # what each request of the batch had in its last step
        self._free_rows: list[int] = []
        self._num_rows = 0

    def observe(self, record: StepRecord) -> None:
        output = record.output
        self._leave([name for name in output.released if name in self._rows], record.preempted)
        for request_id, arrival_time in record.arrival_times.items():
            new = EngineRequest(request_id, arrival_time, joined_at=record.started_at, left_at=None)
            self.requests.setdefault(request_id, new)
        if output.scheduled:
            seconds = record.updated_at - record.started_at
            self.steps.append(
                Step(
                    start=record.started_at,
                    seconds=seconds,
                    execute_seconds=record.executed_at - record.scheduled_at,
                    rows=self._place(output.scheduled),
                    num_waiting=record.num_waiting,
                    num_blocks=record.num_blocks,
                    num_used_blocks=record.num_used_blocks,
                    num_kv_tokens=record.num_kv_tokens,
                    num_pairs=record.num_pairs,
                    num_keys=record.num_keys,
                    num_preemptions=len(record.preempted),
                )
            )
        self._leave(record.left)

    def _place(self, scheduled: Sequence[ScheduledRequest]) -> list[Row]:
        """The shares with their rows: the lowest free one when a request joins, kept until it leaves."""
        for share in scheduled:
            request_id, last = share.request_id, self._rows.get(share.request_id)
            wanted = share.num_scheduled_tokens, len(share.spec_token_ids), share.samples, share.is_padding
            if last is None or wanted != (last.num_tokens, last.num_spec_tokens, last.samples, last.is_padding):
                row = self._take_row() if last is None else last.row
                self._rows[request_id] = Row(request_id, row, *wanted)
        return [self._rows[share.request_id] for share in scheduled]

    def _take_row(self) -> int:
        if self._free_rows:
            return heappop(self._free_rows)
        self._num_rows += 1
        return self._num_rows - 1

    def _leave(self, request_ids: Sequence[str], preempted: Sequence[str] = ()) -> None:
        """Note who is in the batch no more since the last step; those that were preempted come back."""
        for request_id in request_ids:
            heappush(self._free_rows, self._rows.pop(request_id).row)
            if request_id not in preempted:
                left_at = self.steps[-1].start + self.steps[-1].seconds
                self.requests[request_id] = replace(self.requests[request_id], left_at=left_at)
