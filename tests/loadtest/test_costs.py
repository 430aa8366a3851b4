"""The cost model: what it predicts, and its JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.loadtest.accuracy import compare
from shoal.loadtest.costs import CostModel, Deviations, Latencies, StepCosts, StepShape
from shoal.loadtest.errors import LoadTestError
from shoal.scheduler.output import NewRequest, SamplingParams, ScheduledRequest, SchedulerOutput
from tests.loadtest.twin import REALISTIC

EMPTY = StepShape()
STEPS = StepCosts(
    token_counts=(1, 4, 8),
    token_seconds=(1.0, 4.0, 6.0),
    pair_seconds=100,
    key_seconds=1e4,
    sample_seconds=1e6,
    stream_seconds=1e8,
    join_seconds=1e10,
    ordered_seconds=1e12,
    gap_seconds=3,
    stream_gap_seconds=10,
    arrival_gap_seconds=0,
)


@pytest.mark.parametrize(("count", "seconds"), [(1, 1), (2, 2), (4, 4), (6, 5), (8, 6), (10, 7)])
def test_tokens_cost_what_the_lines_say(count: int, seconds: float) -> None:
    assert STEPS.seconds(StepShape(count)) == seconds


def test_everything_else_adds_to_it() -> None:
    assert STEPS.seconds(StepShape(1, 2, 3, 4, 5, 6, 7)) == 7_060_504_030_201
    assert STEPS.gap(StepShape(1, 2, 3, 4, 5, 6, 7)) == 53


def test_a_step_that_computes_nothing_costs_nothing() -> None:
    assert STEPS.seconds(EMPTY) == STEPS.gap(EMPTY) == 0


def test_the_shape_of_a_schedule() -> None:
    new = NewRequest([1] * 9, 9, SamplingParams(max_tokens=1, seed=0))
    shares = [
        ScheduledRequest("joins", 3, 4, [0], 1, False, [], new),
        ScheduledRequest("runs", 10, 1, [], 1, True, [], None),
        ScheduledRequest("pads", 7, 1, [], 1, True, [], None, is_padding=True),
    ]
    # The queries at positions 3 to 6, 10 and 7 see themselves and all before them.
    assert StepShape.of(SchedulerOutput(shares, []), 5) == (6, 4 + 5 + 6 + 7 + 11 + 8, 7 + 11 + 8, 2, 1, 1, 5)


amounts = st.floats(0, 1e3, allow_nan=False)
cost_models = st.builds(
    CostModel,
    steps=st.integers(2, 5).flatmap(
        lambda size: st.builds(
            StepCosts,
            token_counts=st.lists(st.integers(1, 999), min_size=size, max_size=size, unique=True)
            .map(sorted)
            .map(tuple),
            token_seconds=st.lists(amounts, min_size=size, max_size=size).map(tuple),
            pair_seconds=amounts,
            key_seconds=amounts,
            sample_seconds=amounts,
            stream_seconds=amounts,
            join_seconds=amounts,
            ordered_seconds=amounts,
            gap_seconds=amounts,
            stream_gap_seconds=amounts,
            arrival_gap_seconds=amounts,
        )
    ),
    latencies=st.builds(Latencies, **dict.fromkeys(Latencies.__slots__, amounts)),
    deviations=st.dictionaries(
        st.integers(0, 64), st.lists(amounts, min_size=1, max_size=5).map(tuple), max_size=4
    ).map(lambda bands: tuple(Deviations(num_streams=least, ratios=bands[least]) for least in sorted(bands))),
)


@given(cost_models)
def test_what_is_written_is_read(costs: CostModel) -> None:
    assert CostModel.from_json(json.loads(json.dumps(costs.to_json()))) == costs


def breaks(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Set the field at this path; ... takes it away."""

    def change(saved: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            saved = saved[name]
        if value is ...:
            del saved[last]
        else:
            saved[last] = value

    return change


def band(num_streams: int, ratios: Sequence[float | None] = (1.0,)) -> dict[str, object]:
    return {"num_streams": num_streams, "ratios": list(ratios)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (breaks("version", 1), "costs.version is 1, but this Shoal reads 2: profile again"),
        (breaks("latencies", ...), "costs.latencies is missing"),
        (breaks("latencies.send", ...), "costs.latencies.send is missing"),
        (breaks("latencies.send", "1"), "costs.latencies.send must be a finite number, at least 0, not '1'"),
        (breaks("latencies.send", True), "costs.latencies.send must be a finite number, at least 0, not True"),
        (breaks("latencies.walk", 1), "costs.latencies.walk is unknown; known are lateness, send, "),
        (breaks("steps", [1]), r"costs.steps must be a JSON object, not \[1\]"),
        (breaks("steps.pair_seconds", -1.0), "costs.steps.pair_seconds must be a finite number, at least 0, not -1.0"),
        (breaks("steps.pair_seconds", float("nan")), "costs.steps.pair_seconds must be a finite number"),
        (breaks("steps.token_counts", [1, 4, 3, 9, 10]), "costs.steps.token_counts must ascend"),
        (breaks("steps.token_counts", [1, 4]), "must have the same length, at least 2"),
        (breaks("steps.token_counts", 7), "costs.steps.token_counts must be a list of numbers, not 7"),
        (breaks("deviations", 7), "costs.deviations must be a list, not 7"),
        (breaks("deviations", [1]), r"costs.deviations\[0\] must be a JSON object, not 1"),
        (breaks("deviations", [band(1), band(1)]), "costs.deviations must ascend by num_streams"),
        (breaks("deviations", [band(1), band(4, ratios=[])]), r"costs.deviations\[1\].ratios must not be empty"),
        (breaks("deviations", [band(1, ratios=[1.0, None])]), r"deviations\[0\].ratios\[1\] must be a finite number"),
    ],
)
def test_what_is_broken_is_refused_by_name(change: Callable[[dict[str, Any]], None], message: str) -> None:
    saved = json.loads(json.dumps(REALISTIC.to_json()))
    change(saved)
    with pytest.raises(LoadTestError, match=message):
        CostModel.from_json(saved)


def test_steps_deviate_like_those_with_about_as_many_streams() -> None:
    bands = tuple(Deviations(num_streams=least, ratios=(float(least),)) for least in (1, 4, 30))
    costs = replace(REALISTIC, deviations=bands)
    assert [costs.ratios(count) for count in (0, 1, 3, 4, 29, 30, 99)] == [(1,), (1,), (1,), (4,), (4,), (30,), (30,)]
    assert REALISTIC.ratios(1) == ()


# -- predicted beside measured -----------------------------------------------------------------------------------------


@dataclass
class Spread:
    p50: float
    p90: float = 2.0
    p99: float = 4.0


@dataclass
class Figures:
    throughput: float
    ttft: Spread | None
    itl: Spread | None
    e2e: Spread | None


def test_predicted_beside_measured() -> None:
    predicted = Figures(110, Spread(0.9), None, Spread(1.08))
    measured = Figures(100, Spread(1.0, p99=5.0), Spread(1.0), Spread(1.0))
    figures = {figure.name: figure for figure in compare(predicted, measured)}
    assert list(figures) == ["throughput", *(f"{kind} {p}" for kind in ("ttft", "e2e") for p in ("p50", "p90", "p99"))]
    assert {name: figure.error for name, figure in figures.items()} == {
        "throughput": pytest.approx(0.1),
        "ttft p50": pytest.approx(-0.1),
        "ttft p90": 0,
        "ttft p99": pytest.approx(-0.2),
        "e2e p50": pytest.approx(0.08),
        "e2e p90": 0,
        "e2e p99": 0,
    }
    assert [name for name, figure in figures.items() if not figure.is_within] == ["throughput", "ttft p50", "ttft p99"]


def test_nothing_measured_has_no_error() -> None:
    (figure,) = compare(Figures(1, None, None, None), Figures(0, None, None, None))
    assert figure.error is None
    assert not figure.is_within
