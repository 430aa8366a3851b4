"""The cost model: what it predicts, and that a known one comes back from runs that were simulated with it."""

from __future__ import annotations

import dataclasses
import random
from itertools import accumulate, cycle

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.loadtest.costs import NOT_CROWDED, CostModel, Crowding, StepShape, fit
from shoal.loadtest.records import Load, LoadTestError, PlannedRun, Run, Setup
from shoal.loadtest.twin import simulate
from shoal.loadtest.workload import WorkloadRequest
from shoal.scheduler.step_record import ShareRecord
from tests.loadtest.twin import REALISTIC, SECONDS, ask, chat, run, server_info

STEPS = CostModel(
    token_seconds={1: 1.0, 4: 4.0, 8: 6.0},
    pair_seconds=100,
    key_seconds=1e4,
    sample_seconds=1e6,
    stream_seconds=1e8,
)


@pytest.mark.parametrize(("count", "seconds"), [(1, 1), (2, 2), (4, 4), (6, 5), (8, 6), (10, 7)])
def test_tokens_cost_what_the_lines_say(count: int, seconds: float) -> None:
    assert STEPS.seconds(StepShape(count)) == seconds


def test_everything_else_adds_to_it() -> None:
    assert STEPS.seconds(StepShape(1, 2, 3, 4, 5)) == 504_030_201


def test_a_step_that_computes_nothing_costs_nothing() -> None:
    assert STEPS.seconds(StepShape()) == 0


def test_the_shape_of_a_schedule() -> None:
    shares = [
        ShareRecord("joins", 0, 3, 4, 0, False, False),
        ShareRecord("runs", 1, 10, 1, 0, True, False),
        ShareRecord("pads", 2, 7, 1, 0, True, True),
    ]
    # The queries at positions 3 to 6, 10 and 7 see themselves and all before them.
    assert StepShape.of(shares) == (6, 4 + 5 + 6 + 7 + 11 + 8, 7 + 11 + 8, 2, 1)


def test_steps_deviate_like_those_with_about_as_many_tokens() -> None:
    costs = replace(REALISTIC, deviations={1: (1.0,), 4: (4.0,), 30: (30.0,)})
    assert [costs.ratios(count) for count in (0, 1, 3, 4, 29, 30, 99)] == [(1,), (1,), (1,), (4,), (4,), (30,), (30,)]
    assert REALISTIC.ratios(1) == (1.0,)


LATENCIES = ("send_seconds", "delivery_seconds")
AMOUNTS = ("pair_seconds", "key_seconds", "sample_seconds", "stream_seconds", *LATENCIES)
amounts = st.floats(0, 1e3)
cost_models = st.builds(
    CostModel,
    token_seconds=st.dictionaries(st.integers(1, 999), amounts, min_size=2, max_size=5),
    deviations=st.dictionaries(st.integers(0, 64), st.lists(amounts, min_size=1, max_size=5).map(tuple), max_size=4),
    **dict.fromkeys(AMOUNTS, amounts),
)


@given(cost_models)
def test_what_is_written_is_read(costs: CostModel) -> None:
    assert msgspec.json.decode(msgspec.json.encode(costs), type=CostModel) == costs


# -- the fit -----------------------------------------------------------------------------------------------------------


def series(costs: CostModel, first: int = 100) -> list[Run]:
    """Runs that show all there is to know; of a real engine they would also show what is not the executor's time."""
    return [
        run(chat(3), Load(users=1), costs=costs, repetition=first),
        run(chat(6, 1), Load(users=2), costs=costs, repetition=first + 1),
        run(chat(24, 2), Load(users=8), costs=costs, repetition=first + 2),
        run(chat(64, 3), Load(users=32), costs=costs, repetition=first + 3),
        run(chat(80, 4), Load(users=64), costs=costs, repetition=first + 4),
        run(chat(24, 5, num_prompt_tokens=400), Load(users=8), costs=costs, repetition=first + 5),
        run(chat(40, 6), Load(users=16), "static", costs, max_num_seqs=16, repetition=first + 6),
        run(chat(32, 8), Load(rate=16.0), costs=costs, repetition=first + 7),
    ]


def seconds_of_tokens(costs: CostModel) -> list[float]:
    return [costs.seconds(StepShape(count)) for count in (1, 2, 3, 8, 16, 40, 64, 100, 300, 512)]


def test_a_known_cost_model_comes_back() -> None:
    found = fit(series(REALISTIC))
    assert seconds_of_tokens(found) == pytest.approx(seconds_of_tokens(REALISTIC), rel=1e-3)
    for name in AMOUNTS:
        assert getattr(found, name) == pytest.approx(getattr(REALISTIC, name), rel=0.02), name
    ratios = [ratio for band in found.deviations.values() for ratio in band]
    assert ratios == pytest.approx([1.0] * len(ratios))


def test_noise_goes_into_the_deviations() -> None:
    rng = random.Random(0)
    # Steps with few tokens are even; those with many are often slowed down by what passes their tokens on.
    few, many = (
        tuple(sorted(rng.lognormvariate(0, 0.05) * (slower if rng.random() < share else 1) for _ in range(200)))
        for slower, share in ((3, 0.02), (2, 0.3))
    )
    noisy = replace(REALISTIC, deviations={0: few, 16: many})
    fits = [fit(series(noisy, first)) for first in (100, 200, 300)]
    assert np.mean([mean_seconds(one) for one in fits], axis=0) == pytest.approx(mean_seconds(noisy), rel=0.1)
    found = fits[0]
    assert np.quantile(found.ratios(1), 0.95) / np.median(found.ratios(1)) == pytest.approx(1.09, abs=0.04)
    assert np.quantile(found.ratios(32), 0.95) / np.median(found.ratios(32)) == pytest.approx(2.1, abs=0.2)
    # What users see of another load is predicted, as far as one run is like the next.
    for policy in ("fcfs", "static"):
        actual, predicted = (
            [run(chat(80, 9), Load(users=16), policy, costs, repetition=repetition) for repetition in range(4)]
            for costs in (noisy, found)
        )
        for figure in (end, median_ttft, median_e2e):
            expected = np.mean([figure(run) for run in actual])
            assert np.mean([figure(run) for run in predicted]) == pytest.approx(expected, rel=0.08), figure.__name__


def mean_seconds(costs: CostModel) -> list[float]:
    """Of steps that decode 1, 4, 16, 24, 32 and 48 rows, with what they deviate by."""
    shapes = [StepShape(*[count] * 2, 200 * count, *[count] * 2) for count in (1, 4, 16, 24, 32, 48)]
    return [costs.seconds(shape) * float(np.mean(costs.ratios(shape.num_tokens))) for shape in shapes]


def end(run: Run) -> float:
    return max(record.finished_at or 0 for record in run.requests)


def median_ttft(run: Run) -> float:
    return float(np.median([record.token_times[0] - record.sent_at for record in run.requests]))


def median_e2e(run: Run) -> float:
    return float(np.median([(record.finished_at or 0) - record.sent_at for record in run.requests]))


def test_requests_that_failed_and_events_that_lack_are_passed_over() -> None:
    runs = series(REALISTIC)
    for one in runs[:4]:
        one.requests[0].error = "the connection was lost"
        one.requests[0].finished_at = None
        del one.requests[1].token_times[1:2]  # an incomplete character
    found = fit(runs)
    for name in LATENCIES:
        assert getattr(found, name) == pytest.approx(getattr(REALISTIC, name), rel=0.05), name


def test_what_a_short_series_does_not_show_costs_nothing() -> None:
    found = fit([run(chat(8), Load(users=1), costs=REALISTIC)])
    assert found.seconds(StepShape(1, 9, 9, 1, 1)) == pytest.approx(
        REALISTIC.seconds(StepShape(1, 9, 9, 1, 1)), rel=0.05
    )


def test_too_few_steps_are_refused() -> None:
    few = run(chat(1), Load(users=1), costs=REALISTIC)
    few.steps = few.steps[:7]
    with pytest.raises(LoadTestError, match="7 steps were measured, but a cost model needs at least 20"):
        fit([few])


def test_runs_without_steps_in_common_with_the_users_are_no_trouble() -> None:
    alone = run(chat(3), Load(users=1), costs=REALISTIC)
    for record in alone.requests:
        record.engine_id = "another"
    assert fit([alone]).delivery_seconds == 0


def test_engines_that_share_a_machine_slow_each_other_down() -> None:
    """A profile of three engines, and what it says of a run that it has not seen."""
    crowded = replace(REALISTIC, crowding=(NOT_CROWDED, Crowding(1.2), Crowding(1.6, 0.002)))

    def of_three(workload: list[WorkloadRequest], load: Load, costs: CostModel) -> Run:
        server = server_info()
        server.settings["engine"]["engines"] = 3
        planned = PlannedRun(setup=Setup(policy="fcfs"), workload="", load=load)
        return simulate(planned, workload, server=server, costs=costs)

    loads = Load(users=1), Load(users=2), Load(users=8), Load(users=32), Load(rate=60.0)
    found = fit([of_three(chat(40, seed), load, crowded) for seed, load in enumerate(loads)])
    assert len(found.crowding) == 3
    for seconds in (0.001, 0.005, 0.02):
        for number in (1, 2, 3):
            assert found.crowded(number)(seconds) == pytest.approx(crowded.crowded(number)(seconds), rel=0.1)
    load = Load(users=16)
    actual, predicted = (of_three(chat(80, 9), load, costs) for costs in (crowded, found))
    assert all(len(steps) > 50 for steps in (actual.steps, *actual.other_steps))
    for figure in (end, median_ttft, median_e2e):
        assert figure(predicted) == pytest.approx(figure(actual), rel=0.1), figure.__name__


def test_what_most_steps_take_is_not_what_steps_take_that_wait_for_a_core() -> None:
    alone = run([ask("alone", 1, 101, max_tokens=101)], Load(users=1), costs=SECONDS)
    starts = accumulate(cycle((1.0, 1.0, 1.0, 5.0)), initial=0.0)
    waits = [dataclasses.replace(step, start=start) for step, start in zip(alone.steps, starts, strict=False)]
    three = replace(alone, steps=waits, other_steps=[waits, waits])
    assert fit([alone, three]).crowded(3)(1.0) == pytest.approx(2.0, rel=0.02)
