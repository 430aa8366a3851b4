"""One step of an engine as plain data: what every observer of an `EngineCore` is told of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shoal.scheduler.output import RequestOutput, SchedulerOutput, SchedulingParams

if TYPE_CHECKING:  # whoever reads records alone imports no scheduler
    from shoal.scheduler.scheduler import Scheduler


@dataclass(slots=True)
class ShareRecord:
    """One request's share of a step; `ScheduledRequest` says what the fields mean."""

    request_id: str
    row: int
    num_computed_tokens: int
    num_scheduled_tokens: int
    num_spec_tokens: int
    samples: bool
    is_padding: bool


@dataclass(slots=True)
class AskedRecord:
    """What a request asked for: all that the policy may know of it."""

    num_prompt_tokens: int
    max_tokens: int
    scheduling: SchedulingParams = field(default_factory=SchedulingParams)


@dataclass(slots=True, kw_only=True)
class StepRecord:
    """One step.  It holds numbers, strings and lists only, so that msgspec encodes and decodes it as it is.

    Attributes:
        number: of the step, counted from 0 over the steps that were observed.
        start: seconds on the engine's clock, before `schedule`.
        schedule_seconds, execute_seconds, update_seconds: of the three parts.  If the step failed and its shares were
            tried one by one, all of that is execution.
        shares: what was computed; none, if requests only left the batch.
        joined: seconds from arrival to the start of the step, by id, of the requests that joined the batch in it, for
            the first time or again.
        asked: what they asked for, by id.
        preempted: ids of the requests that lost their rows so that others could run.
        gave_way_to: by the id of each request that was preempted in this step, even if it had only just joined, the id
            of the one for which it was.
        accepted: drafted tokens that verification kept, by the id of each request that any were kept of.
        left: ids of the requests that left the batch for good since the step that was observed before, most of them
            in this step.
        num_running, num_waiting: requests after the step was scheduled.
        num_preemptions: in this step.  A request that also joined in this step is not in `preempted`.
        num_blocks: of the KV cache.
        num_used_blocks: blocks that requests own while the step is executed.
        num_kv_tokens: tokens whose keys and values stand in those blocks after the execution, shared ones counted once,
            and each for every cache group that holds it.
    """

    number: int
    start: float
    schedule_seconds: float = 0.0
    execute_seconds: float = 0.0
    update_seconds: float = 0.0
    shares: list[ShareRecord]
    joined: dict[str, float]
    asked: dict[str, AskedRecord] = field(default_factory=dict)
    preempted: list[str]
    gave_way_to: dict[str, str] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    num_running: int
    num_waiting: int
    num_preemptions: int
    num_blocks: int
    num_used_blocks: int
    num_kv_tokens: int

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.schedule_seconds + self.execute_seconds + self.update_seconds


class StepRecorder:
    """Makes the records of the steps of a scheduler's engine."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._number = 0
        self._num_preemptions = 0
        self._batch: list[str] = []  # ids of the requests in the batch when it was last looked at

    def begin(self, output: SchedulerOutput, start: float) -> StepRecord:
        """The record of a step that was scheduled and is not executed yet."""
        running, waiting, stats = self._scheduler.running, self._scheduler.waiting, self._scheduler.stats()
        pool = self._scheduler.kv_cache.pool
        gone = self._gone()
        self._batch = [*running, *self._scheduler.padding]
        joined = [running[share.request_id] for share in output.scheduled if share.new]
        record = StepRecord(
            number=self._number,
            start=start,
            shares=[
                ShareRecord(
                    share.request_id,
                    share.row,
                    share.num_computed_tokens,
                    share.num_scheduled_tokens,
                    len(share.spec_token_ids),
                    share.samples,
                    share.is_padding,
                )
                for share in output.scheduled
            ],
            joined={request.request_id: start - request.arrival_time for request in joined},
            asked={
                request.request_id: AskedRecord(
                    request.num_prompt_tokens, request.params.max_tokens, request.scheduling
                )
                for request in joined
            },
            gave_way_to=output.preempted,
            preempted=[request_id for request_id in gone if request_id in waiting],
            left=[request_id for request_id in gone if request_id not in waiting],
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_preemptions=stats.num_preemptions - self._num_preemptions,
            num_blocks=pool.num_blocks,
            num_used_blocks=pool.num_owned,
            num_kv_tokens=pool.num_owned * self._scheduler.config.block_size - self._num_empty_slots(output),
        )
        self._number += 1
        self._num_preemptions = stats.num_preemptions
        return record

    def end(self, record: StepRecord, news: Iterable[RequestOutput], ends: tuple[float, float, float]) -> None:
        """Complete a record when its step is over; the times are the ends of the three parts."""
        scheduled_at, executed_at, updated_at = ends
        record.accepted = {one.request_id: one.num_accepted_tokens for one in news if one.num_accepted_tokens}
        record.schedule_seconds = scheduled_at - record.start
        record.execute_seconds = executed_at - scheduled_at
        record.update_seconds = updated_at - executed_at
        record.left += self._gone()
        self._batch = [*self._scheduler.running, *self._scheduler.padding]

    def _gone(self) -> list[str]:
        """Requests that have left the batch since it was last looked at."""
        running, padding = self._scheduler.running, self._scheduler.padding
        return [request_id for request_id in self._batch if request_id not in running and request_id not in padding]

    def _num_empty_slots(self, output: SchedulerOutput) -> int:
        """Slots at the ends of the block tables that hold nothing after the step.  Only full blocks are shared."""
        block_size, num_groups = self._scheduler.config.block_size, len(self._scheduler.config.cache_groups)
        served = {share.request_id for share in output.scheduled}
        return sum(
            share.num_blocks * block_size - (share.num_computed_tokens + share.num_scheduled_tokens) * num_groups
            for share in output.scheduled
        ) + sum(
            len(request.block_ids) * block_size - request.num_computed_tokens * num_groups
            for request_id, request in self._scheduler.running.items()
            if request_id not in served
        )
