"""How an engine stands, for those who watch: the batch, the queue with the reasons, and the block pool as a map."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice, zip_longest

from shoal.scheduler.output import ScheduledRequest, SchedulerStats
from shoal.scheduler.request import Request, RequestStatus
from shoal.scheduler.scheduler import Scheduler
from shoal.scheduler.step_record import ShareRecord, StepRecord
from shoal.server.engine.events import (
    CACHED,
    FIRST_ROW,
    FREE,
    MAX_CELLS,
    MAX_WAITING,
    SHARED,
    Row,
    RowState,
    StepEvent,
    Waiting,
    WaitReason,
)


class Picture:
    """Draws how a scheduler stands.

    Between `begin` and `end` it notes what becomes of the policy's orders, as the scheduler reads them; it never asks
    for one itself, because a policy may act on the question.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._counted = scheduler.stats()
        self._order = scheduler.policy.order
        self._holds_back = False  # whether the policy's last order left out those who wait, though there was room
        self._gave_way_to: dict[str, str] = {}  # of waiting requests, for whom they were preempted last
        self._requests: dict[str, Request] = {}  # of the step that is observed
        self._queue: list[Waiting] = []  # while it was computed

    def begin(self) -> None:
        self._counted = self._scheduler.stats()
        policy = self._scheduler.policy
        self._order, policy.order = policy.order, self._note_order  # type: ignore[method-assign]

    def end(self) -> None:
        self._scheduler.policy.order = self._order  # type: ignore[method-assign]
        self._gave_way_to.clear()
        self._requests.clear()

    def note_step(self, scheduled: Iterable[ScheduledRequest], now: float) -> None:
        """A step that is observed was scheduled: at its end some of its requests are gone, and why others waited."""
        batch = self._scheduler.running | self._scheduler.padding
        self._requests = {share.request_id: batch[share.request_id] for share in scheduled}
        self._queue = list(self._waiting(now))

    def note_preempted(self, preempted: Mapping[str, str]) -> None:
        """These gave way in the step that was scheduled, each to that one."""
        self._gave_way_to |= preempted

    def draw(self, now: float, record: StepRecord | None, *, is_whole: bool) -> StepEvent:
        """How the engine stands, and what was counted since the last time; of the rest an event has nothing yet.

        Args:
            now: on the engine's clock.
            record: of the last step, if it was observed and nothing happened since.
            is_whole: whether block tables are wanted.
        """
        scheduler, pool = self._scheduler, self._scheduler.kv_cache.pool
        before, stats = self._counted, scheduler.stats()
        self._counted = stats
        blocks, blocks_per_cell = self._blocks()
        return StepEvent(
            number=stats.num_steps - 1,
            num_steps=stats.num_steps - before.num_steps,
            num_tokens=stats.num_step_tokens - before.num_step_tokens,
            policy=scheduler.policy.name,
            batch=[] if record is None else list(self._batch(record, now)),
            waiting=list(self._waiting(now)) if record is None else self._queue,
            num_waiting=stats.num_waiting,
            num_blocks=pool.num_blocks,
            num_owned_blocks=pool.num_owned,
            blocks_per_cell=blocks_per_cell,
            blocks=blocks,
            tables={one.request_id: one.block_ids for one in scheduler.running.values()} if is_whole else None,
            num_prefix_queries=stats.num_prefix_queries - before.num_prefix_queries,
            num_prefix_hits=stats.num_prefix_hits - before.num_prefix_hits,
            num_draft_tokens=stats.num_draft_tokens - before.num_draft_tokens,
            num_accepted_tokens_per_pos=_gained(stats, before),
        )

    # -- the batch -----------------------------------------------------------------------------------------------

    def _batch(self, record: StepRecord, now: float) -> Iterator[Row]:
        """The rows of a step, and those of requests that paused in it."""
        for share in record.shares:
            request = self._requests.get(share.request_id)
            if request is not None:
                accepted = record.accepted.get(share.request_id, 0)
                yield _row(request, _state(share, request), share, accepted, now)
        for request in self._scheduler.running.values():
            if request.request_id not in self._requests:
                yield _row(request, "pause", None, 0, now)

    # -- the queue -----------------------------------------------------------------------------------------------

    def _note_order(self, running: Collection[Request], waiting: Collection[Request], now: float) -> Iterator[Request]:
        self._holds_back = is_refused = False
        for request in self._order(running, waiting, now):
            was_waiting = request.status is not RequestStatus.RUNNING
            yield request
            is_refused |= was_waiting and request.status is not RequestStatus.RUNNING
        self._holds_back = not is_refused

    def _waiting(self, now: float) -> Iterator[Waiting]:
        """The first of the queue, each with why it waits."""
        scheduler = self._scheduler
        if not scheduler.waiting:
            self._gave_way_to.clear()
            return
        for place, request in enumerate(islice(scheduler.waiting.values(), MAX_WAITING)):
            num_blocks = -(-request.num_tokens // scheduler.config.block_size)
            reason: WaitReason = "policy" if self._holds_back else "behind" if place else self._reason(num_blocks)
            yield Waiting(
                request.request_id,
                reason,
                request.num_tokens,
                num_blocks,
                request.num_preemptions,
                self._gave_way_to.get(request.request_id, ""),
                round(now - request.arrival_time, 3),
            )

    def _reason(self, num_blocks: int) -> WaitReason:
        """Why the first request that may be admitted was not, when it needs so many blocks."""
        scheduler = self._scheduler
        if len(scheduler.running) + len(scheduler.padding) >= scheduler.config.max_num_seqs:
            return "rows"
        if num_blocks > scheduler.kv_cache.pool.num_available:
            return "blocks"
        return "budget"

    # -- the blocks ----------------------------------------------------------------------------------------------

    def _blocks(self) -> tuple[str, int]:
        """The map, see `StepEvent.blocks`, and the blocks that a character stands for."""
        scheduler, pool = self._scheduler, self._scheduler.kv_cache.pool
        per_cell = -(-pool.num_blocks // MAX_CELLS)
        cells = array("H", [FREE]) * -(-pool.num_blocks // per_cell)
        for request in (*scheduler.running.values(), *scheduler.padding.values()):
            mark = FIRST_ROW + request.row
            for block_id in request.block_ids:
                if block_id >= 0:  # others were given back
                    cell = block_id // per_cell
                    cells[cell] = mark if per_cell > 1 or cells[cell] == FREE else SHARED
        is_evictable = pool.is_evictable
        for cell, mark in enumerate(cells):
            if mark == FREE and is_evictable(cell * per_cell):
                cells[cell] = CACHED
        return cells.tobytes().decode("utf-16-le" if sys.byteorder == "little" else "utf-16-be"), per_cell


def _row(request: Request, state: RowState, share: ShareRecord | None, num_accepted: int, now: float) -> Row:
    return Row(
        share.row if share else request.row,
        request.request_id,
        state,
        request.num_prompt_tokens,
        request.num_tokens,
        request.max_num_tokens,
        share.num_computed_tokens if share else request.num_computed_tokens,
        share.num_scheduled_tokens if share else 0,
        share.num_spec_tokens if share else 0,
        num_accepted,
        request.num_cached_tokens,
        request.num_preemptions,
        round(now - request.arrival_time, 3),
    )


def _state(share: ShareRecord, request: Request) -> RowState:
    if share.is_padding:
        return "padding"
    is_one = share.num_scheduled_tokens - share.num_spec_tokens == 1
    return "decode" if is_one and share.num_computed_tokens >= request.num_prompt_tokens else "prefill"


def _gained(stats: SchedulerStats, before: SchedulerStats) -> list[int]:
    """Accepted tokens by their place in the proposal, since before."""
    pairs = zip_longest(stats.num_accepted_tokens_per_pos, before.num_accepted_tokens_per_pos, fillvalue=0)
    return [now - then for now, then in pairs]
