"""What the digital twin knows of time: costs of steps and latencies around the engine, fitted to measured runs.

The form of the model is that of Vidur (Agrawal et al. 2024, "Vidur: A Large-Scale Simulation Framework for LLM
Inference"): predictions from the size of a batch, fitted to a short profile.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from typing import Annotated, NamedTuple

import numpy as np
from msgspec import Meta, Struct
from msgspec.structs import astuple
from numpy.typing import NDArray
from scipy.optimize import nnls

from shoal.loadtest.records import LoadTestError, Run
from shoal.loadtest.trace import ends, stays
from shoal.scheduler.output import ScheduledRequest
from shoal.scheduler.policies import find_policy
from shoal.scheduler.step_record import ShareRecord

Array = NDArray[np.float64]
Amount = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0)]

_TOKEN_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 256, 512)  # the cost of a step is linear between two of them
_MIN_STEPS = 20
_BANDS = (0, 2, 4, 8, 16, 32, 64)  # of streams, each up to the next
_NUM_RATIOS = 200  # of a band
_NUM_ROUNDS = 20
_HUBER = 1.345 * 1.4826  # Huber's 1.345 standard deviations, each 1.4826 median absolute errors if errors are normal
_TINY = 1e-12


class StepShape(NamedTuple):
    """What the cost of a step depends on.

    Attributes:
        num_tokens: all tokens, those of padding rows and drafted ones too.
        num_pairs: pairs of query and key that attention computes.
        num_keys: keys that the rows see, each row's counted once; attention reads them.
        num_samples: rows for which a token is chosen, padding rows too.
        num_streams: rows whose token goes to a client, which takes time on the engine's cores in all processes.
        num_ordered: waiting requests that the policy sorts; 0 for a policy that does not sort.
    """

    num_tokens: int = 0
    num_pairs: int = 0
    num_keys: int = 0
    num_samples: int = 0
    num_streams: int = 0
    num_ordered: int = 0

    @classmethod
    def of(cls, shares: Iterable[ScheduledRequest | ShareRecord], num_ordered: int = 0) -> StepShape:
        num_tokens = num_pairs = num_keys = num_samples = num_streams = 0
        for share in shares:
            count = share.num_scheduled_tokens
            num_tokens += count
            num_pairs += count * share.num_computed_tokens + count * (count + 1) // 2
            num_keys += share.num_computed_tokens + count
            num_samples += share.samples
            num_streams += share.samples and not share.is_padding
        return cls(num_tokens, num_pairs, num_keys, num_samples, num_streams, num_ordered)


class StepCosts(Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds from the start of a step to that of the next, if there is something to compute.

    Attributes:
        token_seconds: the seconds of a step by its number of tokens, on straight lines between at least two points;
            the last line goes on.
        pair_seconds to ordered_seconds: what one more of each further count of `StepShape` adds, in its order.
    """

    token_seconds: Annotated[dict[Count, Amount], Meta(min_length=2)]
    pair_seconds: Amount
    key_seconds: Amount
    sample_seconds: Amount
    stream_seconds: Amount
    ordered_seconds: Amount

    def seconds(self, shape: StepShape) -> float:
        """The seconds of a step; 0 if it computes nothing."""
        if not shape.num_tokens:
            return 0.0
        counts = sorted(self.token_seconds)
        place = min(max(bisect_right(counts, shape.num_tokens), 1), len(counts) - 1)
        before, after = counts[place - 1], counts[place]
        slope = (self.token_seconds[after] - self.token_seconds[before]) / (after - before)
        further: float = sum(number * seconds for number, seconds in zip(shape[1:], astuple(self)[1:], strict=False))
        return self.token_seconds[before] + slope * (shape.num_tokens - before) + further


class Latencies(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds outside the engine.  The API process does one thing at a time, which is to send tokens.

    Attributes:
        send: of a request on its way from the user to the engine.
        token: the API process's work on a token, or the client's if that takes longer.
        delivery: from the end of that work to the client's notice of the token, if no other token is before it.
        turnaround: closed loop: from the end of an answer to the user's next request, without the time to think.
    """

    send: Amount
    token: Amount
    delivery: Amount
    turnaround: Amount


class CostModel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that the twin knows of time.

    Attributes:
        deviations: measured over predicted seconds of steps, by their least number of streams; ascending, each for an
            equal share of the profile's steps.  The simulator draws from them, so that predictions contain what else
            the machine did, above all passing on tokens on the engine's cores.  If empty, nothing deviates.
    """

    steps: StepCosts
    latencies: Latencies
    deviations: dict[Count, Annotated[tuple[Amount, ...], Meta(min_length=1)]] = {}

    def ratios(self, num_streams: int) -> tuple[float, ...]:
        """The deviations of steps with `num_streams` streams; the first ones if it lies below all."""
        known = sorted(self.deviations)
        return self.deviations[known[max(bisect_right(known, num_streams) - 1, 0)]] if known else (1.0,)


# -- the fit of steps --------------------------------------------------------------------------------------------------


def fit(runs: Sequence[Run]) -> CostModel:
    """The cost model that agrees best with measured runs.

    Costs are never negative; a cost of which the runs show nothing is 0.  Outliers hardly move the costs, but they
    are in the deviations, which keep the total time.

    Raises:
        LoadTestError: there are too few steps to fit.
    """
    steps = [step for run in runs for step in run.steps]
    if len(steps) < _MIN_STEPS:
        raise LoadTestError(f"{len(steps)} steps were measured, but a cost model needs at least {_MIN_STEPS}")
    shapes = [
        StepShape.of(step.shares, step.num_waiting if find_policy(run.setup.policy).sorts else 0)
        for run in runs
        for step in run.steps
    ]
    outside = np.array([step.schedule_seconds + step.update_seconds for step in steps])
    seconds = np.array([end for run in runs for end in ends(run.steps)]) - [step.start for step in steps]
    ordered = _fit_order(shapes, outside)
    tokens, *others, num_ordered = np.array(shapes, dtype=float).T
    counts = np.array([count for count in _TOKEN_COUNTS if count < tokens.max()] + [max(tokens.max(), 2)])
    # The columns are a constant, the rise from each count to the next, and the other counts of a shape.
    rises = np.clip((tokens[:, None] - counts[:-1]) / np.diff(counts), 0, 1)
    found = fit_robustly(np.column_stack([np.ones(len(tokens)), rises, *others]), seconds - ordered * num_ordered)
    points = zip(counts.astype(int).tolist(), found[: len(counts)].cumsum().tolist(), strict=True)
    costs = StepCosts(dict(points), *[*found[len(counts) :].tolist(), ordered])
    return CostModel(
        steps=costs,
        latencies=_fit_latencies(runs),
        deviations=_deviations(shapes, seconds, np.array([costs.seconds(shape) for shape in shapes])),
    )


def fit_robustly(table: Array, target: Array) -> Array:
    """Coefficients x, none negative, for which `table @ x` is near `target`.

    Errors are relative to the prediction and count by the loss of Huber 1964 ("Robust Estimation of a Location
    Parameter"): nonnegative least squares, weighted anew by the errors some times.
    """
    target = np.maximum(target, _TINY)
    scale = np.maximum(np.abs(table).max(axis=0), _TINY)
    weights = 1 / target
    for _ in range(_NUM_ROUNDS):
        found = nnls(table / scale * weights[:, None], target * weights)[0]
        predicted = np.maximum(table / scale @ found, _TINY)
        errors = np.abs(target / predicted - 1)
        limit = _HUBER * max(float(np.median(errors)), 1e-6)
        weights = np.sqrt(np.minimum(1, limit / np.maximum(errors, _TINY))) / predicted
    return np.asarray(found / scale)


def _fit_order(shapes: Sequence[StepShape], seconds: Array) -> float:
    """Seconds for each waiting request that is sorted, from the seconds outside the executor.

    They are so few that the noise of a whole step would hide them, but a queue may be long.
    """
    table = np.array([shape._replace(num_pairs=1, num_keys=1) for shape in shapes], dtype=float)  # no attention there
    return float(fit_robustly(table, seconds)[-1])


def _deviations(shapes: Sequence[StepShape], seconds: Array, predicted: Array) -> dict[int, tuple[float, ...]]:
    num_streams = np.array([shape.num_streams for shape in shapes])
    found = {}
    for least, following in pairwise((*_BANDS, np.inf)):
        chosen = (least <= num_streams) & (num_streams < following)
        if chosen.sum() >= _MIN_STEPS:
            ratios = np.sort(seconds[chosen] / predicted[chosen])
            ratios *= seconds[chosen].sum() / predicted[chosen].sum() / ratios.mean()  # the sum is predicted right
            parts = np.array_split(ratios, min(_NUM_RATIOS, len(ratios)))
            found[int(least)] = tuple(float(part.mean()) for part in parts)
    return found


# -- the fit of latencies ----------------------------------------------------------------------------------------------


def _fit_latencies(runs: Sequence[Run]) -> Latencies:
    """The typical latencies of these runs; 0 for those that no request shows."""
    between, first = zip(*map(_deliveries, runs), strict=True)
    token = _typical(chain(*between))
    return Latencies(
        send=_typical(_typical(_ways(run)) for run in runs),
        token=token,
        delivery=max(_typical(chain(*first)) - token, 0.0),
        turnaround=_typical(chain(*map(_turnarounds, runs))),
    )


def _typical(values: Iterable[float]) -> float:
    known = list(values)
    return max(float(np.median(known)), 0.0) if known else 0.0


def _ways(run: Run) -> Iterator[float]:
    """Seconds from sending a request to its arrival in the engine, if that did not wait for the end of a step."""
    step_ends = [step.start + step.seconds for step in run.steps]
    found = stays(run.steps)
    for record in run.requests:
        stay = found.get(record.engine_id)
        if stay and bisect_left(step_ends, record.sent_at) == bisect_right(step_ends, stay.arrived_at):
            yield stay.arrived_at - record.sent_at


def _deliveries(run: Run) -> tuple[list[float], list[float]]:
    """Mean seconds between the tokens of each step, and seconds from its end to its first token.

    The latter only where the tokens of the step before, which would delay it, were there already.
    """
    times = {
        record.engine_id: iter(record.token_times)
        for record in run.requests
        if record.is_answered and len(record.token_times) == record.num_output_tokens  # no token shared its event
    }
    between, first, last = [], [], -np.inf
    for step, end in zip(run.steps, ends(run.steps), strict=True):
        streams = [share.request_id for share in step.shares if share.samples and not share.is_padding]
        if seen := sorted(time for name in streams for time in islice(times.get(name, iter(())), 1)):
            if len(seen) > 1:
                between.append((seen[-1] - seen[0]) / (len(seen) - 1))
            if last <= end:
                first.append(seen[0] - end)
            last = seen[-1]
    return between, first


def _turnarounds(run: Run) -> Iterator[float]:
    """Seconds from each answer's end to the next request, in a closed loop whose users do not think."""
    ends = sorted(record.finished_at for record in run.requests if record.finished_at is not None)
    if run.load.users and not run.load.think_seconds and len(ends) == len(run.requests):
        sent = sorted(record.sent_at for record in run.requests)
        yield from (begin - end for end, begin in zip(ends, sent[run.load.users :], strict=False))
