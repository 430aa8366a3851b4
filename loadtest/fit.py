"""Fits the cost model of the digital twin to runs of the real engine."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from shoal.loadtest.costs import CostModel, Deviations, StepCosts, StepShape
from shoal.loadtest.errors import LoadTestError
from shoal.loadtest.fit_latencies import fit_latencies
from shoal.loadtest.records import Run
from shoal.loadtest.regression import fit_robustly
from shoal.scheduler.policies import find_policy

Array = NDArray[np.float64]

_TOKEN_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 256, 512)  # between which steps cost what a line says
_MIN_STEPS = 20
_ATTENTION = [StepShape._fields.index(name) for name in ("num_pairs", "num_keys")]
_ORDERED = StepShape._fields.index("num_ordered")  # the last column of a table of shapes
_NUM_RATIOS = 200


def fit(runs: Sequence[Run]) -> CostModel:
    """The cost model that agrees best with what was measured, under load and in the closed loop without time to think.

    Costs are never negative.  A few outliers do not move them, but are in the deviations, which keep the total time.

    Raises:
        LoadTestError: there are too few steps to fit.
    """
    steps = [step for run in runs for step in run.steps if step.rows]
    if len(steps) < _MIN_STEPS:
        raise LoadTestError(f"{len(steps)} steps were measured, but a cost model needs at least {_MIN_STEPS}")
    shapes = [shape for run in runs for shape in _shapes(run)]
    seconds = np.array([step.seconds for step in steps])
    ordered = _fit_order(shapes, seconds - np.array([step.execute_seconds for step in steps]))
    costs = _fit_steps(shapes, seconds, ordered, _fit_gaps(runs))
    latencies = fit_latencies(runs, costs.arrival_gap_seconds)
    predicted = np.array([costs.seconds(shape) for shape in shapes])
    return CostModel(steps=costs, latencies=latencies, deviations=_deviations(shapes, seconds, predicted))


def _shapes(run: Run) -> Iterator[StepShape]:
    """The shapes of all steps but empty ones."""
    orders = find_policy(run.setup.policy).sorts
    before: set[str] = set()
    for step in run.steps:
        if step.rows:
            num_joins = sum(row.request_id not in before for row in step.rows)
            yield StepShape.of_step(step, num_joins, step.num_waiting if orders else 0)
        before = {row.request_id for row in step.rows}


def _fit_order(shapes: Sequence[StepShape], seconds: Array) -> float:
    """What a waiting request that is put in order costs, from the seconds outside the executor.

    Of a whole step it is so little that noise would hide it, but a queue may be long.
    """
    table = np.array(shapes, dtype=float)
    if not table[:, _ORDERED].any():
        return 0.0
    table[:, _ATTENTION] = 1  # which is not what happens there
    return float(fit_robustly(table, seconds)[_ORDERED])


def _fit_steps(
    shapes: Sequence[StepShape], seconds: Array, ordered: float, gaps: tuple[float, float, float]
) -> StepCosts:
    table = np.array(shapes, dtype=float)
    seconds = seconds - ordered * table[:, _ORDERED]
    most = table[:, 0].max()
    counts = np.array([count for count in _TOKEN_COUNTS if count < most] + [max(most, 2)])
    # A constant, the slope between each two counts, and what else there is.
    slopes = np.clip(table[:, :1] - counts[:-1], 0, np.diff(counts))
    found = fit_robustly(np.hstack([np.ones((len(table), 1)), slopes, table[:, 1:_ORDERED]]), seconds)
    at_counts = found[0] + np.concatenate([[0], np.cumsum(found[1 : len(counts)] * np.diff(counts))])
    pair, key, sample, stream, join = found[len(counts) :].tolist()
    return StepCosts(
        token_counts=tuple(map(int, counts)),
        token_seconds=tuple(at_counts.tolist()),
        pair_seconds=pair,
        key_seconds=key,
        sample_seconds=sample,
        stream_seconds=stream,
        join_seconds=join,
        ordered_seconds=ordered,
        gap_seconds=gaps[0],
        stream_gap_seconds=gaps[1],
        arrival_gap_seconds=gaps[2],
    )


def _fit_gaps(runs: Iterable[Run]) -> tuple[float, float, float]:
    """Seconds between two steps if the engine has not to wait, and what each token that goes to somebody and each
    request that comes adds."""
    gaps = [gap for run in runs for gap in _gaps(run)]
    if not gaps:
        return 0.0, 0.0, 0.0
    *columns, seconds = np.array(gaps).T
    table = np.column_stack([np.ones(len(gaps)), *columns])
    found = fit_robustly(table, seconds)
    if found.any():  # those that took long, for another process was at work, count in the sum
        found *= seconds.sum() / (table @ found).sum()
    constant, stream, arrival = found.tolist()
    return constant, stream, arrival


def _gaps(run: Run) -> Iterator[tuple[int, int, float]]:
    """Streams of each step, requests that came from its start to the next one's, and the seconds until that; but for
    steps between which there may have been nothing to do."""
    arrivals = sorted(request.arrived_at for request in run.engine_requests.values())
    for before, after in pairwise(run.steps):
        goes_on = {row.request_id for row in before.rows if not row.is_padding}
        if any(row.request_id in goes_on and not row.is_padding for row in after.rows):
            num_streams = sum(row.samples and not row.is_padding for row in before.rows)
            num_arrivals = bisect_left(arrivals, after.start) - bisect_left(arrivals, before.start)
            yield num_streams, num_arrivals, max(after.start - before.start - before.seconds, 0.0)


def _deviations(shapes: Sequence[StepShape], seconds: Array, predicted: Array) -> tuple[Deviations, ...]:
    """Of bands of streams by powers of two; one with few steps is a part of the next."""
    bands = np.array([shape.num_streams.bit_length() for shape in shapes])
    found: list[Deviations] = []
    left = np.zeros(len(bands), dtype=bool)
    for band in sorted(set(bands.tolist())):
        left |= bands == band
        if left.sum() >= _MIN_STEPS or band == bands.max():
            least = min(shape.num_streams for shape, is_in in zip(shapes, left, strict=True) if is_in)
            found.append(Deviations(num_streams=least, ratios=_ratios(seconds[left], predicted[left])))
            left[:] = False
    return tuple(found)


def _ratios(seconds: Array, predicted: Array) -> tuple[float, ...]:
    """Means of equal shares of the ratios, ascending, scaled so that the predictions have the right sum."""
    ratios = np.sort(seconds / predicted)
    ratios *= seconds.sum() / predicted.sum() / ratios.mean()
    parts = np.array_split(ratios, min(_NUM_RATIOS, len(ratios)))
    return tuple(float(part.mean()) for part in parts)
