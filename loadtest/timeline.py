"""The engine's steps over time: which request occupied which row, how full batch and cache were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from statistics import median

import numpy as np
from numpy.typing import NDArray

from shoal.loadtest.records import Run
from shoal.loadtest.steps import Row, Step

Floats = NDArray[np.float64]


class Work(Enum):
    """What was computed for a row."""

    PREFILL = "prefill"
    DECODE = "decode"
    PADDING = "padding"


@dataclass(frozen=True, slots=True)
class Bar:
    """A row that one request occupied with one kind of work in steps that follow each other.

    Attributes:
        turn: how many other requests had occupied the row before.
        start, end: seconds; a row belongs to its request between its steps too.
    """

    row: int
    turn: int
    request_id: str
    work: Work
    start: float
    end: float


def work(row: Row) -> Work:
    """What a share of a step is; of a prompt whose only missing token is scheduled alone it cannot be told: decode."""
    if row.is_padding:
        return Work.PADDING
    return Work.PREFILL if not row.samples or row.num_tokens - row.num_spec_tokens > 1 else Work.DECODE


def bars(steps: Iterable[Step]) -> list[Bar]:
    """The picture of the batch, in the order of the bars' starts."""
    done: list[Bar] = []
    last: dict[int, Bar] = {}  # of each row, its last bar
    before: set[int] = set()  # rows of the step before
    for step in steps:
        for row in step.rows:
            bar = last.get(row.row)
            goes_on = bar is not None and bar.request_id == row.request_id and row.row in before
            if bar is not None and goes_on and bar.work is work(row):
                last[row.row] = replace(bar, end=step.start + step.seconds)
                continue
            if bar is not None:
                done.append(replace(bar, end=step.start) if goes_on else bar)
            turn = 0 if bar is None else bar.turn + (bar.request_id != row.request_id)
            last[row.row] = Bar(row.row, turn, row.request_id, work(row), step.start, step.start + step.seconds)
        before = {row.row for row in step.rows}
    return sorted([*done, *last.values()], key=lambda bar: (bar.start, bar.row))


def batch_starts(steps: Iterable[Step]) -> list[float]:
    """Starts of the steps with nobody in them who was in the step before."""
    starts = []
    before: set[str] = set()
    for step in steps:
        now = {row.request_id for row in step.rows}
        if now and before.isdisjoint(now):
            starts.append(step.start)
        before = now
    return starts


def window(run: Run, num_batches: int = 3) -> tuple[float, float]:
    """From the first step on, so much of a run as shows its first batches; without batches as many median stays."""
    start, end = run.steps[0].start, _end(run.steps[-1])
    starts = batch_starts(run.steps)
    if len(starts) > num_batches:
        return start, starts[num_batches]
    if len(starts) == num_batches:
        return start, end
    stays = [
        request.left_at - request.joined_at
        for request in run.engine_requests.values()
        if request.joined_at is not None and request.left_at is not None
    ]
    return start, min(end, start + num_batches * median(stays)) if stays else end


@dataclass(frozen=True, slots=True)
class Course:
    """Means over short stretches of time, all of one length.

    Attributes:
        times: middles of the stretches.
        working, padding: rows of the batch; none when the engine had nothing to do.
        kv_owned, kv_filled: shares of the KV cache: of all blocks those that requests own, and of all slots those in
            which keys and values stand.
    """

    times: Floats
    working: Floats
    padding: Floats
    kv_owned: Floats
    kv_filled: Floats


def course(steps: Sequence[Step], block_size: int, until: float, num_stretches: int = 300) -> Course:
    """How full batch and cache were, from the first step to a moment."""
    edges = np.linspace(steps[0].start, until, num_stretches + 1)
    starts = np.array([step.start for step in steps])
    ends = np.array(_holds_until(steps))
    padding = np.array([sum(row.is_padding for row in step.rows) for step in steps])
    rows = np.array([len(step.rows) for step in steps])
    blocks = np.array([max(step.num_blocks, 1) for step in steps])

    def means(values: Floats) -> Floats:
        """Of what is constant from each start to its end, and nothing between: the slope of its integral."""
        integral = np.concatenate([[0.0], np.cumsum(values * (ends - starts))])
        moments = np.stack([starts, ends], axis=1).ravel()
        return np.asarray(np.diff(np.interp(edges, moments, np.repeat(integral, 2)[1:-1])) / np.diff(edges))

    return Course(
        times=(edges[:-1] + edges[1:]) / 2,
        working=means(rows - padding),
        padding=means(padding),
        kv_owned=means(np.array([step.num_used_blocks for step in steps]) / blocks),
        kv_filled=means(np.array([step.num_kv_tokens for step in steps]) / (blocks * block_size)),
    )


def _holds_until(steps: Sequence[Step]) -> list[float]:
    """Until when what a step did stays so: to the next one where somebody goes on, else to its end."""
    names = [{row.request_id for row in step.rows} for step in steps]
    held = [
        following.start if not names[i].isdisjoint(names[i + 1]) else _end(step)
        for i, (step, following) in enumerate(pairwise(steps))
    ]
    return [*held, _end(steps[-1])]


def _end(step: Step) -> float:
    return step.start + step.seconds
