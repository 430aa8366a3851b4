"""Each step of an engine as plain data, and as a Chrome trace, which https://ui.perfetto.dev opens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from shoal.scheduler.output import RequestOutput, SchedulerOutput
from shoal.scheduler.scheduler import Scheduler


@dataclass(slots=True, kw_only=True)
class StepRecord:
    """One step, as the observer of an `EngineCore` is told of it; times are seconds on the core's clock.

    Attributes:
        started_at, scheduled_at, executed_at, updated_at: before `schedule`, and after each of the three.  If the step
            failed and its shares were tried one by one, all of that is execution.
        output: what was scheduled; nothing, where requests were only released.
        arrival_times: of the requests that join the batch, for the first time or again.
        preempted: ids of the requests that lost their place in the batch in this step.
        num_waiting: requests that wait after the step was scheduled.
        num_blocks, block_size: of the KV cache.
        num_used_blocks: blocks that requests own while the step is executed.
        num_idle_slots: empty slots at the ends of the block tables of those that sit the step out.
        news: what came of it.
        left: ids of the requests that had a share and are in the batch no more after the step.
    """

    started_at: float
    scheduled_at: float
    executed_at: float = 0.0
    updated_at: float = 0.0
    output: SchedulerOutput
    arrival_times: dict[str, float]
    preempted: list[str]
    num_waiting: int
    num_blocks: int
    block_size: int
    num_used_blocks: int
    num_idle_slots: int
    news: list[RequestOutput] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, scheduler: Scheduler, output: SchedulerOutput, started_at: float, scheduled_at: float) -> StepRecord:
        """What is seen of a step before it is executed."""
        joining = [share.request_id for share in output.scheduled if share.new]
        served = {share.request_id for share in output.scheduled}
        idle = [request for request_id, request in scheduler.running.items() if request_id not in served]
        block_size = scheduler.config.block_size
        return cls(
            started_at=started_at,
            scheduled_at=scheduled_at,
            output=output,
            arrival_times={request_id: scheduler.running[request_id].arrival_time for request_id in joining},
            preempted=[request_id for request_id in output.released if request_id in scheduler.waiting],
            num_waiting=len(scheduler.waiting),
            num_blocks=scheduler.config.num_blocks,
            block_size=block_size,
            num_used_blocks=scheduler.kv_cache.pool.num_owned,
            num_idle_slots=sum(len(one.block_ids) * block_size - one.num_computed_tokens for one in idle),
        )

    def end(self, scheduler: Scheduler, news: list[RequestOutput], executed_at: float, updated_at: float) -> None:
        """Add what is seen of it after."""
        self.executed_at, self.updated_at, self.news = executed_at, updated_at, news
        self.left = [
            share.request_id
            for share in self.output.scheduled
            if share.request_id not in scheduler.running and share.request_id not in scheduler.padding
        ]

    @property
    def num_kv_tokens(self) -> int:
        """Tokens whose keys and values stand in the owned blocks when the step has been executed, shared ones once.

        Blocks are shared only when they are full: so what is owned in all, less what is empty at the ends of the block
        tables.
        """
        empty = sum(
            share.num_blocks * self.block_size - share.num_computed_tokens - share.num_scheduled_tokens
            for share in self.output.scheduled
        )
        return self.num_used_blocks * self.block_size - empty - self.num_idle_slots

    @property
    def num_pairs(self) -> int:
        """Pairs of a query and a key that it sees, over the whole step."""
        return sum(
            share.num_scheduled_tokens * (2 * share.num_computed_tokens + share.num_scheduled_tokens + 1) // 2
            for share in self.output.scheduled
        )

    @property
    def num_keys(self) -> int:
        """Keys that the rows see, each row's counted once, however many queries it has."""
        return sum(share.num_computed_tokens + share.num_scheduled_tokens for share in self.output.scheduled)


@dataclass(slots=True)
class _Seat:
    """A request's time in the batch, in nanoseconds.

    Attributes:
        end: of its last step so far.
    """

    row: int
    arrival: int
    start: int
    end: int


_STEPS = 1  # the thread that the steps are drawn on; row n is drawn on thread _ROWS + n
_ROWS = 2
_encode = json.JSONEncoder(separators=(",", ":")).encode


class ChromeTrace:
    """Writes steps in the Trace Event Format (JSON array, one event a line, never closed, as the format allows).

    Args:
        write: called once for each step with whole lines, so that what is written is a trace at any time.
        pid: the process that the events are of.
        continues: whether another engine began the same trace.

    - Thread `steps`: an event for each step, with `schedule`, `execute` and `update` inside it.  Its `args` are what
      `loadtest.steps.read_trace` reads: `rows` ([request id, row, tokens, drafted tokens, samples, is padding] of each
      share), `arrived` (when, of the requests that join), `left` (who has left the batch for good since the step
      before), `execute` (duration), `pairs`, `waiting`, `blocks`, `used_blocks`, `kv_tokens` and `preemptions`.
    - Thread `row N`: an event for the time in which a request occupied that row of the batch, padding included.  A
      request takes the lowest free row when it joins, and keeps it until it leaves.
    - Counters `running`, `waiting` and `KV usage` (share of the blocks that are owned).

    Times are microseconds with three decimals.
    """

    def __init__(self, write: Callable[[str], object], *, pid: int = 1, continues: bool = False) -> None:
        self._write = write
        self._pid = pid
        self._seats: dict[str, _Seat] = {}
        self._free_rows: list[int] = []
        self._num_rows = 0
        self._lines: list[str] = [] if continues else ["["]
        self._name("process_name", _STEPS, "engine")
        self._name("thread_name", _STEPS, "steps")
        self._flush()

    def step(self, record: StepRecord) -> None:
        """Write a step: the observer to give to an `EngineCore`."""
        start, end = _nanoseconds(record.started_at), _nanoseconds(record.updated_at)
        vacated = [request_id for request_id in record.output.released if request_id in self._seats]
        for request_id in vacated:
            self._leave(request_id, is_preempted=request_id in record.preempted)
        for request_id, arrival_time in record.arrival_times.items():
            self._join(request_id, _nanoseconds(arrival_time), start)
        for share in record.output.scheduled:
            self._seats[share.request_id].end = end
        left = [request_id for request_id in vacated if request_id not in record.preempted] + record.left
        self._add_step(record, left, start, end)
        for request_id in record.left:
            self._leave(request_id, is_preempted=False)
        if not self._seats and not record.num_waiting:
            self._count(end, running=0, waiting=0, usage=0.0)
        self._flush()

    # -- rows ----------------------------------------------------------------------------------------------------

    def _join(self, request_id: str, arrival: int, start: int) -> None:
        if self._free_rows:
            row = heappop(self._free_rows)
        else:
            row, self._num_rows = self._num_rows, self._num_rows + 1
            self._name("thread_name", _ROWS + row, f"row {row}")
        self._seats[request_id] = _Seat(row, arrival, start, start)

    def _leave(self, request_id: str, *, is_preempted: bool) -> None:
        seat = self._seats.pop(request_id)
        heappush(self._free_rows, seat.row)
        args = {"arrived": _microseconds(seat.arrival), "preempted": is_preempted}
        self._span(request_id, _ROWS + seat.row, seat.start, seat.end, args)

    # -- events --------------------------------------------------------------------------------------------------

    def _add_step(self, record: StepRecord, left: list[str], start: int, end: int) -> None:
        scheduled, executed = _nanoseconds(record.scheduled_at), _nanoseconds(record.executed_at)
        args = {
            "rows": [
                (
                    share.request_id,
                    self._seats[share.request_id].row,
                    share.num_scheduled_tokens,
                    len(share.spec_token_ids),
                    share.samples,
                    share.is_padding,
                )
                for share in record.output.scheduled
            ],
            "arrived": {name: _microseconds(self._seats[name].arrival) for name in record.arrival_times},
            "left": left,
            "execute": _microseconds(executed - scheduled),
            "pairs": record.num_pairs,
            "keys": record.num_keys,
            "waiting": record.num_waiting,
            "blocks": record.num_blocks,
            "used_blocks": record.num_used_blocks,
            "kv_tokens": record.num_kv_tokens,
            "preemptions": len(record.preempted),
        }
        self._span("step", _STEPS, start, end, args)
        self._span("schedule", _STEPS, start, scheduled)
        self._span("execute", _STEPS, scheduled, executed)
        self._span("update", _STEPS, executed, end)
        num_running = sum(not share.is_padding for share in record.output.scheduled)
        usage = record.num_used_blocks / record.num_blocks
        self._count(start, running=num_running, waiting=record.num_waiting, usage=usage)

    def _span(self, name: str, tid: int, start: int, end: int, args: dict[str, Any] | None = None) -> None:
        times = {"ts": _microseconds(start), "dur": _microseconds(end - start)}
        self._add({"name": name, "ph": "X", **times, "pid": self._pid, "tid": tid} | ({"args": args} if args else {}))

    def _count(self, at: int, *, running: int, waiting: int, usage: float) -> None:
        for name, unit, value in (
            ("running", "requests", running),
            ("waiting", "requests", waiting),
            ("KV usage", "share", usage),
        ):
            self._add({"name": name, "ph": "C", "ts": _microseconds(at), "pid": self._pid, "args": {unit: value}})

    def _name(self, kind: str, tid: int, name: str) -> None:
        self._add({"name": kind, "ph": "M", "pid": self._pid, "tid": tid, "args": {"name": name}})

    def _add(self, event: dict[str, Any]) -> None:
        self._lines.append(_encode(event) + ",")

    def _flush(self) -> None:
        lines, self._lines = self._lines, []
        self._write("\n".join(lines) + "\n")


def _nanoseconds(seconds: float) -> int:
    """Whole ones, so that what lies inside a step does so to the last digit."""
    return round(seconds * 1e9)


def _microseconds(nanoseconds: int) -> float:
    return nanoseconds / 1000
