"""What the digital twin knows of time: costs of steps and latencies around the engine, fitted to measured runs.

The form of the model is that of Vidur (Agrawal et al. 2024, "Vidur: A Large-Scale Simulation Framework for LLM
Inference"): predictions from the size of a batch, fitted to a short profile.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from random import Random
from typing import Annotated, NamedTuple

import numpy as np
from msgspec import Meta, Struct
from msgspec.structs import replace
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from shoal.loadtest.records import LoadTestError, Run
from shoal.loadtest.trace import ends, stays
from shoal.scheduler.output import ScheduledRequest
from shoal.scheduler.step_record import ShareRecord

Array = NDArray[np.float64]
Amount = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0)]

_TOKEN_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 256, 512)  # the cost of a step is linear between two of them
_MIN_STEPS = 20
_USUAL_ERROR = 0.05  # of a step's cost; larger ones are outliers
_BANDS = (0, 2, 4, 8, 16, 32, 64)  # of tokens, each up to the next; the last ones are those of prompts
_NUM_RATIOS = 200  # of a band
_NUM_DRAWS = 2**12  # of deviations, which then come again


class StepShape(NamedTuple):
    """What the cost of a step depends on.

    Attributes:
        num_tokens: all tokens, those of padding rows and drafted ones too.
        num_pairs: pairs of query and key that attention computes.
        num_keys: keys that the rows see, each row's counted once; attention reads them.
        num_samples: rows for which a token is chosen, padding rows too.
        num_streams: rows whose token goes to a client, which takes time on the engine's cores in all processes.
    """

    num_tokens: int = 0
    num_pairs: int = 0
    num_keys: int = 0
    num_samples: int = 0
    num_streams: int = 0

    @classmethod
    def of(cls, shares: Iterable[ScheduledRequest | ShareRecord]) -> StepShape:
        counts = []
        for share in shares:
            tokens, before, samples = share.num_scheduled_tokens, share.num_computed_tokens, share.samples
            pairs = tokens * before + tokens * (tokens + 1) // 2
            counts.append((tokens, pairs, before + tokens, samples, samples and not share.is_padding))
        return cls(*map(sum, zip(*counts, strict=True)))


class Crowding(NamedTuple):
    """What engines on one machine make of each other's steps.

    Attributes:
        factor: what a step takes over what most take alone.
        wait_seconds: that are added to it, however short it is: where there are fewer cores than engines, a step waits
            until another one's turn on a core is over.
    """

    factor: Amount = 1.0
    wait_seconds: Amount = 0.0

    def __call__(self, seconds: float) -> float:
        """The seconds of a step that takes so many alone."""
        return self.factor * seconds + self.wait_seconds


NOT_CROWDED = Crowding()


class CostModel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that the twin knows of time, in seconds.

    A step lasts until the next one starts, if there is something to compute.

    Attributes:
        token_seconds: of a step by its number of tokens, on straight lines between at least two points; the last
            line goes on.
        pair_seconds, key_seconds, sample_seconds, stream_seconds: what one more of each further count of `StepShape`
            adds to a step.
        deviations: measured over predicted seconds of steps, by their least number of tokens; ascending, each for an
            equal share of the profile's steps.  The twin draws from them, so that predictions contain what else the
            machine did, above all passing on tokens on the engine's cores.  If empty, nothing deviates.
        crowding: of steps while 1, 2, ... engines compute on the machine; empty if the profile is of one engine.
        send_seconds: of a request on its way from the user to the engine.
        delivery_seconds: of a token on its way from the end of its step to the user.
    """

    token_seconds: Annotated[dict[Count, Amount], Meta(min_length=2)]
    pair_seconds: Amount = 0.0
    key_seconds: Amount = 0.0
    sample_seconds: Amount = 0.0
    stream_seconds: Amount = 0.0
    deviations: dict[Count, Annotated[tuple[Amount, ...], Meta(min_length=1)]] = {}
    crowding: tuple[Crowding, ...] = ()
    send_seconds: Amount = 0.0
    delivery_seconds: Amount = 0.0

    def seconds(self, shape: StepShape) -> float:
        """The seconds of a step that does not deviate; 0 if it computes nothing."""
        if not shape.num_tokens:
            return 0.0
        same = self.seconds_of_rows(shape.num_tokens, shape.num_samples, shape.num_streams)
        return same + (self.pair_seconds * shape.num_pairs + self.key_seconds * shape.num_keys)

    def seconds_of_rows(self, num_tokens: int, num_samples: int, num_streams: int) -> float:
        """Of the seconds of a step, those that do not depend on what its tokens see."""
        counts = sorted(self.token_seconds)
        place = min(max(bisect_right(counts, num_tokens), 1), len(counts) - 1)
        before, after = counts[place - 1], counts[place]
        slope = (self.token_seconds[after] - self.token_seconds[before]) / (after - before)
        return (
            self.token_seconds[before]
            + slope * (num_tokens - before)
            + self.sample_seconds * num_samples
            + self.stream_seconds * num_streams
        )

    def crowded(self, num_busy: int) -> Crowding:
        """What so many engines that compute on the machine make of a step."""
        return self.crowding[min(num_busy, len(self.crowding)) - 1] if self.crowding else NOT_CROWDED

    def ratios(self, num_tokens: int) -> tuple[float, ...]:
        """The deviations of steps with `num_tokens` tokens; the first ones if it lies below all."""
        known = sorted(self.deviations)
        return self.deviations[known[max(bisect_right(known, num_tokens) - 1, 0)]] if known else (1.0,)


class Durations:
    """How long steps take, deviations included: a cost model, and what was drawn of its deviations with a seed.

    An engine counts its steps, and the deviation of a step depends on its number and its tokens alone.
    """

    def __init__(self, costs: CostModel, seed: int) -> None:
        self._costs = costs
        random = Random(seed)
        self._draws = np.array([random.random() for _ in range(_NUM_DRAWS)])
        self._of_band: dict[tuple[float, ...], Array] = {}
        self._of_rows: dict[int, tuple[float, Array]] = {}

    def one(self, shape: StepShape, number: int, crowding: Crowding) -> float:
        """The seconds of the step with this number."""
        return crowding(self._costs.seconds(shape)) * float(self._deviations(shape.num_tokens)[number % _NUM_DRAWS])

    def plain(self, num_rows: int, num_keys: int, number: int, count: int) -> Array:
        """The seconds of steps that follow each other, in which rows decode that see `num_keys` keys in the first."""
        if num_rows not in self._of_rows:
            same = self._costs.seconds_of_rows(num_rows, num_rows, num_rows)
            self._of_rows[num_rows] = same, self._deviations(num_rows)
        same, deviations = self._of_rows[num_rows]
        first, keys = number % _NUM_DRAWS, np.arange(num_keys, num_keys + count * num_rows, num_rows)
        found: Array = same + (self._costs.pair_seconds * keys + self._costs.key_seconds * keys)
        found *= deviations[first : first + count]
        return found

    def _deviations(self, num_tokens: int) -> Array:
        ratios = self._costs.ratios(num_tokens)
        if ratios not in self._of_band:
            drawn = np.array(ratios)[(self._draws * len(ratios)).astype(int)]
            self._of_band[ratios] = np.concatenate([drawn, drawn])
        return self._of_band[ratios]


def fit(runs: Sequence[Run]) -> CostModel:
    """The cost model that agrees best with measured runs; a cost of which they show nothing is 0.

    Where several engines shared the machine, a step also takes longer by how many of them computed when it began.

    Raises:
        LoadTestError: there are too few steps to fit.
    """
    engines = [replace(run, steps=own, other_steps=[]) for run in runs for own in (run.steps, *run.other_steps)]
    shapes = [StepShape.of(step.shares) for run in engines for step in run.steps]
    if len(shapes) < _MIN_STEPS:
        raise LoadTestError(f"{len(shapes)} steps were measured, but a cost model needs at least {_MIN_STEPS}")
    seconds = np.array(
        [end - step.start for run in engines for step, end in zip(run.steps, ends(run.steps), strict=True)]
    )
    tokens, *others = np.array(shapes, dtype=float).T
    counts = np.array([count for count in _TOKEN_COUNTS if count < tokens.max()] + [max(tokens.max(), 2)])
    # The columns are a constant, the rise from each count to the next, and the other counts of a shape.
    rises = np.clip((tokens[:, None] - counts[:-1]) / np.diff(counts), 0, 1)
    table = np.column_stack([np.ones(len(tokens)), rises, *others])
    scale = np.maximum(table.max(axis=0), 1)
    num_busy = np.concatenate([_num_busy(run) for run in runs])
    found, crowding = _least_errors(table / scale, seconds, num_busy)
    found /= scale
    # Most steps fit now.  But where there are fewer cores than engines, some steps wait for long, so that sums do not.
    alone = table @ found
    if len(crowding) > 1:
        for index in range(len(crowding)):
            chosen = num_busy == index + 1
            if chosen.sum() >= _MIN_STEPS:
                crowding[index] = _right_in_sum(alone[chosen], seconds[chosen])
    predicted = np.array([crowding[count - 1](value) for count, value in zip(num_busy, alone, strict=True)])
    pair, key, sample, stream = found[len(counts) :].tolist()
    return CostModel(
        token_seconds=dict(zip(counts.astype(int).tolist(), found[: len(counts)].cumsum().tolist(), strict=True)),
        pair_seconds=pair,
        key_seconds=key,
        sample_seconds=sample,
        stream_seconds=stream,
        deviations=_deviations(tokens, seconds, predicted),
        crowding=tuple(crowding) if len(crowding) > 1 else (),
        send_seconds=_usual_way(engines),
        delivery_seconds=_typical(map(_deliveries, engines)),
    )


def _num_busy(run: Run) -> NDArray[np.int64]:
    """How many engines computed when each step began, its own included; engine by engine."""
    engines = [steps for steps in (run.steps, *run.other_steps) if steps]
    spans = [(np.array([step.start for step in steps]), np.array(ends(steps))) for steps in engines]
    if not spans:
        return np.zeros(0, np.int64)
    moments = np.concatenate([starts for starts, _ in spans])
    found = np.zeros(len(moments), np.int64)
    for starts, own_ends in spans:
        latest = np.searchsorted(starts, moments, "right") - 1
        found += (latest >= 0) & (own_ends[latest] > moments)
    return np.maximum(found, 1)


def _least_errors(table: Array, seconds: Array, num_busy: NDArray[np.int64]) -> tuple[Array, list[Crowding]]:
    """Coefficients x, none negative, and the crowding by the number of engines that compute; that of one is none.

    With them the logarithm of what becomes of `table @ x` is near that of `seconds`.  A large error counts by its size
    and not by its square, so that hiccups of the machine hardly move the costs.
    """
    width, most, usual = table.shape[1], int(num_busy.max()), float(np.median(seconds))

    def split(values: Array) -> tuple[Array, Array, Array]:
        factors, waits = values[width:].reshape(2, most - 1)
        return values[:width], np.append(1.0, factors), np.append(0.0, waits * usual)

    def errors(values: Array) -> Array:
        costs, factors, waits = split(values)
        return np.log((table @ costs * factors[num_busy - 1] + waits[num_busy - 1]) / seconds)

    start = np.concatenate([np.full(width, usual / width), np.ones(most - 1), np.zeros(most - 1)])
    found = least_squares(errors, start, bounds=(0, np.inf), loss="soft_l1", f_scale=_USUAL_ERROR).x
    costs, factors, waits = split(np.asarray(found))
    return costs, [Crowding(*line) for line in zip(factors.tolist(), waits.tolist(), strict=True)]


def _right_in_sum(alone: Array, seconds: Array) -> Crowding:
    """The crowding with which the sum of all seconds is right, and that of the relative errors is none."""
    weights = alone**-0.5
    line, _ = nnls(np.column_stack([alone * weights, weights]), seconds * weights)
    return Crowding(*line.tolist())


def _deviations(tokens: Array, seconds: Array, predicted: Array) -> dict[int, tuple[float, ...]]:
    found = {}
    for least, following in pairwise((*_BANDS, np.inf)):
        chosen = (least <= tokens) & (tokens < following)
        if chosen.sum() >= _MIN_STEPS:
            ratios = np.sort(seconds[chosen] / predicted[chosen])
            ratios *= seconds[chosen].sum() / predicted[chosen].sum() / ratios.mean()  # the sum is predicted right
            parts = np.array_split(ratios, min(_NUM_RATIOS, len(ratios)))
            found[int(least)] = tuple(float(part.mean()) for part in parts)
    return found


def _typical(values_of_runs: Iterable[Iterable[float]]) -> float:
    """The median of all values; 0 if there are none."""
    known = [value for values in values_of_runs for value in values]
    return max(float(np.median(known)), 0.0) if known else 0.0


def _usual_way(runs: Iterable[Run]) -> float:
    """The seconds from sending a request to its arrival in the engine that agree with most requests; 0 without any.

    What comes during a step is taken after it.  So of such a request only bounds are known: it was not there when the
    step began, and there at its end.
    """
    bounds = []
    for run in runs:
        starts, occupied = [step.start for step in run.steps], ends(run.steps)
        found = stays(run.steps)
        for record in run.requests:
            if stay := found.get(record.engine_id):
                step = bisect_right(starts, stay.arrived_at) - 1
                waited = step >= 0 and occupied[step] >= stay.arrived_at
                most = max(stay.arrived_at - record.sent_at, 0.0)
                bounds.append((max(starts[step] - record.sent_at, 0.0) if waited else most, most))
    if not bounds:
        return 0.0
    # Between two neighbouring bounds the same requests agree.
    values = np.unique(bounds)
    lows, highs = (np.sort(side) for side in np.array(bounds).T)
    agreeing = np.searchsorted(lows, values, "right") - np.searchsorted(highs, values, "left")
    return float(values[agreeing == agreeing.max()].max())


def _deliveries(run: Run) -> Iterator[float]:
    """Seconds from the end of each step to the user's notice of each of its tokens."""
    times = {
        record.engine_id: iter(record.token_times)
        for record in run.requests
        if record.is_answered and len(record.token_times) == record.num_output_tokens  # no token shared its event
    }
    for step, end in zip(run.steps, ends(run.steps), strict=True):
        for share in step.shares:
            if share.samples and not share.is_padding:
                yield from (time - end for time in islice(times.get(share.request_id, iter(())), 1))
