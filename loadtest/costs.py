"""What a step costs, and the way of a request and its tokens outside the engine: what the digital twin knows of time.

The form of the model is that of Vidur (Agrawal et al. 2024, "Vidur: A Large-Scale Simulation Framework for LLM
Inference"): predictions from the size of a batch, fitted to a short profile.  `loadtest/fit.py` fits it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from math import isfinite
from typing import Any, NamedTuple

from shoal.loadtest.errors import LoadTestError
from shoal.loadtest.steps import Step
from shoal.scheduler.output import SchedulerOutput

VERSION = 2  # of the JSON


class StepShape(NamedTuple):
    """What the cost of a step depends on.

    Attributes:
        num_tokens: in all, those of padding rows and drafted ones too.
        num_pairs: pairs of query and key that attention computes.
        num_keys: keys that the rows see, each row's counted once: what attention reads.
        num_samples: rows for which a token is chosen, padding rows too.
        num_streams: those of them whose token goes to somebody: it costs the engine a message, and takes the cores that
            the engine computes on for the server's other process and for the client.
        num_joins: requests that join the batch.
        num_ordered: waiting requests that the policy puts in order; none for those that take them as they come.
    """

    num_tokens: int = 0
    num_pairs: int = 0
    num_keys: int = 0
    num_samples: int = 0
    num_streams: int = 0
    num_joins: int = 0
    num_ordered: int = 0

    @classmethod
    def of(cls, output: SchedulerOutput, num_ordered: int) -> StepShape:
        num_tokens = num_pairs = num_keys = num_samples = num_streams = num_joins = 0
        for share in output.scheduled:
            count = share.num_scheduled_tokens
            num_tokens += count
            num_pairs += count * share.num_computed_tokens + count * (count + 1) // 2
            num_keys += share.num_computed_tokens + count
            num_samples += share.samples
            num_streams += share.samples and not share.is_padding
            num_joins += share.new is not None
        return cls(num_tokens, num_pairs, num_keys, num_samples, num_streams, num_joins, num_ordered)

    @classmethod
    def of_step(cls, step: Step, num_joins: int, num_ordered: int) -> StepShape:
        """That of a step that was traced."""
        return cls(
            num_tokens=sum(row.num_tokens for row in step.rows),
            num_pairs=step.num_pairs,
            num_keys=step.num_keys,
            num_samples=sum(row.samples for row in step.rows),
            num_streams=sum(row.samples and not row.is_padding for row in step.rows),
            num_joins=num_joins,
            num_ordered=num_ordered,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """Seconds of the engine's steps, and between them.

    Attributes:
        token_counts: ascending.
        token_seconds: of a step of so many tokens; on straight lines between these counts, and beyond the last ones.
        pair_seconds, key_seconds, sample_seconds, stream_seconds, join_seconds, ordered_seconds: what one more of each
            adds.
        gap_seconds, stream_gap_seconds, arrival_gap_seconds: from the end of a step to the start of the next, if the
            engine has not to wait, and what a token that goes to somebody and a request that comes add to it.
    """

    token_counts: tuple[int, ...]
    token_seconds: tuple[float, ...]
    pair_seconds: float
    key_seconds: float
    sample_seconds: float
    stream_seconds: float
    join_seconds: float
    ordered_seconds: float
    gap_seconds: float
    stream_gap_seconds: float
    arrival_gap_seconds: float

    def seconds(self, shape: StepShape) -> float:
        """Of a step; nothing if it computes nothing."""
        if not shape.num_tokens:
            return 0.0
        return (
            self._of_tokens(shape.num_tokens)
            + shape.num_pairs * self.pair_seconds
            + shape.num_keys * self.key_seconds
            + shape.num_samples * self.sample_seconds
            + shape.num_streams * self.stream_seconds
            + shape.num_joins * self.join_seconds
            + shape.num_ordered * self.ordered_seconds
        )

    def gap(self, shape: StepShape) -> float:
        """Seconds after a step of this shape, but for requests that come."""
        return self.gap_seconds + shape.num_streams * self.stream_gap_seconds if shape.num_tokens else 0.0

    def _of_tokens(self, count: int) -> float:
        counts, seconds = self.token_counts, self.token_seconds
        index = min(max(bisect_right(counts, count), 1), len(counts) - 1)
        slope = (seconds[index] - seconds[index - 1]) / (counts[index] - counts[index - 1])
        return seconds[index - 1] + slope * (count - counts[index - 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Seconds outside the engine.  The API process takes one thing after the other: requests, and tokens to send.

    Attributes:
        lateness: open loop: from when a request is due to when the load generator sends it; latencies count from then.
        send: from sending a request to when the API process could begin with it.
        request, prompt_token: that process's work on a request, and on each token of its prompt.
        command: from when the API process has taken a request to when the engine can.
        token: the API process's work on a token, or the client's if that is more.
        delivery: from the end of that work, were there none before it, to the client's notice of the token.
        end: from a stream's last token to its end.
        turnaround: closed loop: from the end of an answer to the next request of the user, beside the time to think.
    """

    lateness: float
    send: float
    request: float
    prompt_token: float
    command: float
    token: float
    delivery: float
    end: float
    turnaround: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviations:
    """How steps of some number of streams deviate from what is predicted of them.

    Attributes:
        num_streams: the least; the most is below that of the next.
        ratios: measured over predicted seconds of the profile's steps, ascending, each for an equal share of them.
    """

    num_streams: int
    ratios: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """All that the twin knows of time.

    Attributes:
        deviations: by the number of streams, ascending.  The simulator draws from them, so that what the machine did
            beside is in its predictions too: above all, passing on the tokens of the step before, on the cores that
            the engine computes on.  Empty: steps take exactly what is predicted.
    """

    steps: StepCosts
    latencies: Latencies
    deviations: tuple[Deviations, ...] = ()

    def ratios(self, num_streams: int) -> tuple[float, ...]:
        """Of steps with so many streams; those of the fewest, if there were never so few."""
        place = bisect_right(self.deviations, num_streams, key=lambda one: one.num_streams)
        return self.deviations[max(place - 1, 0)].ratios if self.deviations else ()

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION} | asdict(self)

    @classmethod
    def from_json(cls, value: object) -> CostModel:
        """Read what `to_json` made.

        Raises:
            LoadTestError: it is something else, or of another version; names the field.
        """
        costs = read_object(value, "costs", ["version", *(field.name for field in fields(cls))])
        if costs["version"] != VERSION:
            raise LoadTestError(f"costs.version is {costs['version']!r}, but this Shoal reads {VERSION}: profile again")
        return cls(
            steps=_read_step_costs(costs["steps"]),
            latencies=_read_latencies(costs["latencies"]),
            deviations=_read_deviations(costs["deviations"]),
        )


def read_object(value: object, name: str, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """Take a JSON object that has exactly these keys, or any (None).

    Raises:
        LoadTestError: it is something else; names the key.
    """
    if not isinstance(value, dict):
        raise LoadTestError(f"{name} must be a JSON object, not {value!r:.40}")
    if keys is None:
        return value
    if missing := [key for key in keys if key not in value]:
        raise LoadTestError(f"{name}.{missing[0]} is missing")
    if unknown := value.keys() - set(keys):
        raise LoadTestError(f"{name}.{min(unknown)} is unknown; known are {', '.join(keys)}")
    return value


def _read_step_costs(value: object) -> StepCosts:
    read = read_object(value, "costs.steps", [field.name for field in fields(StepCosts)])
    lists = ("token_counts", "token_seconds")
    counts, seconds = (_amounts(read[key], f"costs.steps.{key}") for key in lists)
    if len(counts) < 2 or len(counts) != len(seconds):
        raise LoadTestError("costs.steps.token_counts and token_seconds must have the same length, at least 2")
    if any(after <= before for before, after in pairwise(counts)):
        raise LoadTestError("costs.steps.token_counts must ascend")
    amounts = {key: _amount(read[key], f"costs.steps.{key}") for key in read if key not in lists}
    return StepCosts(token_counts=tuple(map(int, counts)), token_seconds=tuple(seconds), **amounts)


def _read_latencies(value: object) -> Latencies:
    read = read_object(value, "costs.latencies", [field.name for field in fields(Latencies)])
    return Latencies(**{key: _amount(read[key], f"costs.latencies.{key}") for key in read})


def _read_deviations(value: object) -> tuple[Deviations, ...]:
    if not isinstance(value, list):
        raise LoadTestError(f"costs.deviations must be a list, not {value!r:.40}")
    read: list[Deviations] = []
    for index, one in enumerate(value):
        name = f"costs.deviations[{index}]"
        fields_of = read_object(one, name, ["num_streams", "ratios"])
        ratios = _amounts(fields_of["ratios"], f"{name}.ratios")
        if not ratios:
            raise LoadTestError(f"{name}.ratios must not be empty")
        read.append(
            Deviations(num_streams=int(_amount(fields_of["num_streams"], f"{name}.num_streams")), ratios=tuple(ratios))
        )
    if any(after.num_streams <= before.num_streams for before, after in pairwise(read)):
        raise LoadTestError("costs.deviations must ascend by num_streams")
    return tuple(read)


def _amounts(value: object, name: str) -> list[float]:
    if not isinstance(value, list | tuple):
        raise LoadTestError(f"{name} must be a list of numbers, not {value!r:.40}")
    return [_amount(one, f"{name}[{index}]") for index, one in enumerate(value)]


def _amount(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
        raise LoadTestError(f"{name} must be a finite number, at least 0, not {value!r:.40}")
    return float(value)
