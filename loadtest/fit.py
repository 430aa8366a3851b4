"""Fits the cost model of the digital twin to runs of the real engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from loadtest.costs import CostModel, StepCosts, StepShape, puts_in_order
from loadtest.errors import LoadTestError
from loadtest.fit_latencies import fit_latencies
from loadtest.records import Run
from loadtest.regression import fit_robustly
from loadtest.steps import Step
from scheduler.policies import find_policy

Array = NDArray[np.float64]

_TOKEN_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 256, 512)  # between which steps cost what a line says
_MIN_STEPS = 20
_ORDERED = StepShape._fields.index("num_ordered")  # the last column of a table of shapes
_NUM_RESIDUALS = 200


def fit(runs: Sequence[Run]) -> CostModel:
    """The cost model that agrees best with what was measured, under load and in the closed loop without time to think.

    Costs are never negative.  A few outliers do not move them, but are in the residuals, which keep the total time.

    Raises:
        LoadTestError: there are too few steps to fit.
    """
    steps = [step for run in runs for step in run.steps if step.rows]
    if len(steps) < _MIN_STEPS:
        raise LoadTestError(f"{len(steps)} steps were measured, but a cost model needs at least {_MIN_STEPS}")
    shapes = [shape for run in runs for shape in _shapes(run)]
    seconds = np.array([step.seconds for step in steps])
    ordered = _fit_order(shapes, seconds - np.array([step.execute_seconds for step in steps]))
    costs = _fit_steps(shapes, seconds, ordered, *_fit_gaps(runs))
    predicted = np.array([costs.seconds(shape) for shape in shapes])
    return CostModel(steps=costs, latencies=fit_latencies(runs), residuals=_residuals(seconds, predicted))


def _shapes(run: Run) -> Iterator[StepShape]:
    """The shapes of all steps but empty ones."""
    orders = puts_in_order(find_policy(run.setup.policy))
    before: set[str] = set()
    for step in run.steps:
        if step.rows:
            yield _shape(step, before, orders)
        before = {row.request_id for row in step.rows}


def _shape(step: Step, before: set[str], orders: bool) -> StepShape:
    return StepShape(
        num_tokens=sum(row.num_tokens for row in step.rows),
        num_pairs=step.num_pairs,
        num_samples=sum(row.samples for row in step.rows),
        num_streams=sum(row.samples and not row.is_padding for row in step.rows),
        num_joins=sum(row.request_id not in before for row in step.rows),
        num_ordered=step.num_waiting if orders else 0,
    )


def _fit_order(shapes: Sequence[StepShape], seconds: Array) -> float:
    """What a waiting request that is put in order costs, from the seconds outside the executor.

    Of a whole step it is so little that noise would hide it, but a queue may be long.
    """
    table = np.array(shapes, dtype=float)
    if not table[:, _ORDERED].any():
        return 0.0
    table[:, StepShape._fields.index("num_pairs")] = 1  # attention is not what happens there
    return float(fit_robustly(table, seconds)[_ORDERED])


def _fit_steps(
    shapes: Sequence[StepShape], seconds: Array, ordered: float, gap_seconds: float, stream_gap_seconds: float
) -> StepCosts:
    table = np.array(shapes, dtype=float)
    seconds = seconds - ordered * table[:, _ORDERED]
    most = table[:, 0].max()
    counts = np.array([count for count in _TOKEN_COUNTS if count < most] + [max(most, 2)])
    # A constant, the slope between each two counts, and what else there is.
    slopes = np.clip(table[:, :1] - counts[:-1], 0, np.diff(counts))
    found = fit_robustly(np.hstack([np.ones((len(table), 1)), slopes, table[:, 1:_ORDERED]]), seconds)
    at_counts = found[0] + np.concatenate([[0], np.cumsum(found[1 : len(counts)] * np.diff(counts))])
    pair, sample, stream, join = found[len(counts) :].tolist()
    return StepCosts(
        token_counts=tuple(map(int, counts)),
        token_seconds=tuple(at_counts.tolist()),
        pair_seconds=pair,
        sample_seconds=sample,
        stream_seconds=stream,
        join_seconds=join,
        ordered_seconds=ordered,
        gap_seconds=gap_seconds,
        stream_gap_seconds=stream_gap_seconds,
    )


def _fit_gaps(runs: Iterable[Run]) -> tuple[float, float]:
    """Seconds between two steps if the engine has not to wait, and what each token that goes to somebody adds."""
    gaps = [gap for run in runs for before, after in pairwise(run.steps) if (gap := _gap(before, after))]
    if not gaps:
        return 0.0, 0.0
    table = np.array(gaps)
    constant, per_stream = fit_robustly(np.column_stack([np.ones(len(table)), table[:, 0]]), table[:, 1]).tolist()
    return constant, per_stream


def _gap(before: Step, after: Step) -> tuple[int, float] | None:
    """Streams of a step and the seconds until the next; None if there may have been nothing to do between them."""
    goes_on = {row.request_id for row in before.rows if not row.is_padding}
    if not any(row.request_id in goes_on and not row.is_padding for row in after.rows):
        return None
    num_streams = sum(row.samples and not row.is_padding for row in before.rows)
    return num_streams, max(after.start - before.start - before.seconds, 0.0)


def _residuals(seconds: Array, predicted: Array) -> tuple[float, ...]:
    """Means of equal shares of the ratios, ascending, scaled so that the predictions have the right sum."""
    ratios = np.sort(seconds / predicted)
    ratios *= seconds.sum() / predicted.sum() / ratios.mean()
    parts = np.array_split(ratios, min(_NUM_RESIDUALS, len(ratios)))
    return tuple(float(part.mean()) for part in parts)
