"""Figures of runs against figures that were worked out by hand, and against numpy and scipy."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from scipy import stats

from shoal.loadtest.metrics import Slo, collect, combine, fairness, groups, jain, quantiles, summarize
from shoal.loadtest.records import Load, RequestRecord, Run, Setup
from shoal.loadtest.report import terminal_tables
from shoal.scheduler.step_record import StepRecord
from tests.loadtest.made_runs import SERVER, share
from tests.loadtest.made_runs import step as make_step


def record(name: str, sent_at: float, *token_times: float, **values: object) -> RequestRecord:
    """An answer of as many tokens as times, which ends with the last."""
    base = RequestRecord(
        request_id=name,
        sent_at=sent_at,
        token_times=list(token_times),
        finished_at=token_times[-1] if token_times else None,
        num_prompt_tokens=10,
        num_output_tokens=len(token_times),
    )
    return replace(base, **values)  # type: ignore[arg-type]


def run(*records: RequestRecord, **values: object) -> Run:
    setup, load = Setup(policy="fcfs"), Load(users=2)
    return Run(setup=setup, workload="chat", load=load, server=SERVER, requests=list(records), **values)  # type: ignore[arg-type]


def step(start: float, seconds: float, num_working: int, num_padding: int = 0, **values: int) -> StepRecord:
    shares = [share(i, f"r{i}", padding=i >= num_working) for i in range(num_working + num_padding)]
    return make_step(start, *shares, seconds=seconds, **{"num_used_blocks": 4, "num_kv_tokens": 32} | values)


def test_throughput_and_latencies_count_from_the_first_request_to_the_end_of_the_last() -> None:
    records = record("a", 1.0, 2.0, 2.5, 3.5), record("b", 2.0, 4.0, 6.0)
    found = summarize(run(*records, generator_cpu_seconds=0.5, api_cpu_seconds=1.0))
    expected = {
        "seconds": 5.0,
        "throughput": 1.0,  # 5 tokens
        "request rate": 0.4,
        "ttft mean": 1.5,
        "itl p50": 1.0,  # of 0.5, 1, 2
        "tpot mean": (0.75 + 2.0) / 2,
        "e2e mean": (2.5 + 4.0) / 2,
        "generator cores": 0.1,
        "generator cores per 1000": 100.0,
        "api cores": 0.2,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_goodput_needs_both_objectives() -> None:
    good = record("good", 0.0, 0.5, 0.55)
    late = record("late", 0.0, 1.5, 1.55)
    slow = record("slow", 0.0, 0.5, 2.0)
    one_token = record("one", 0.0, 0.5)
    failed = record("failed", 0.0, error="HTTP 500")
    found = summarize(run(good, late, slow, one_token, failed), Slo(ttft=1.0, tpot=0.1))
    assert found["goodput share"] == pytest.approx(2 / 5)
    assert found["goodput"] == pytest.approx(2 / 2.0)
    assert found["errors"] == 1


def test_queueing_is_the_engines_and_ttft_from_admission_is_without_it() -> None:
    steps = [make_step(1.25, share(0, "a"), joined={"a": 0.25}), make_step(2.5, share(0, "a"), left=["a"])]
    found = summarize(run(record("a", 0.5, 2.0, engine_id="a"), record("b", 0.5, 2.0, engine_id="b"), steps=steps))
    assert found["queueing p99"] == pytest.approx(0.25)
    assert found["ttft from admission p50"] == pytest.approx(0.75)
    assert found["ttft p50"] == pytest.approx(1.5)


def test_steps_are_weighted_by_time() -> None:
    steps = [step(0.0, 1.0, 1, 3, num_preemptions=2), step(1.0, 3.0, 3, num_used_blocks=8, num_kv_tokens=128)]
    found = summarize(run(steps=steps))
    expected = {
        "batch": 2.5,
        "padding rows": 0.75,
        "padding share": 0.75 / 3.25,
        "tokens per step": 3.25,
        "kv usage": 0.25 * 0.4 + 0.75 * 0.8,
        "kv usage peak": 0.8,
        "kv utilisation": (0.25 * 32 + 0.75 * 128) / (0.25 * 64 + 0.75 * 128),
        "kv waste": 0.25 * 2 / 3.25,  # blocks: two are empty for a quarter of the time
        "preemptions": 2,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_tokens_that_were_cached_and_accepted() -> None:
    drafted = {"num_cached_tokens": 5, "num_accepted_tokens": 3, "num_rejected_tokens": 1}
    found = summarize(run(record("a", 0.0, 1.0, **drafted), record("b", 0.0, 1.0)))
    assert found["cached share"] == pytest.approx(0.25)
    assert found["acceptance rate"] == pytest.approx(0.75)


def test_clients_and_priorities_are_told_apart_where_there_are_several() -> None:
    one = run(record("a", 0.0, 1.0, client="x"), record("b", 0.0, 3.0, 4.0, client="y", priority=10))
    found = summarize(one)
    assert groups(collect([one])) == {"client": ["client x", "client y"], "priority": ["priority 0", "priority 10"]}
    assert found["client x: ttft p50"] == 1.0
    assert found["client y: throughput"] == pytest.approx(0.5)
    assert not groups(collect([run(record("a", 0.0, 1.0))]))


@pytest.mark.parametrize(
    "empty",
    [
        run(),
        run(record("a", 0.0, error="refused"), record("b", 0.0, error="refused")),
        run(record("a", 1.0), is_complete=False),
        run(record("a", 1.0, 2.0, error="broken off", finished_at=None)),
    ],
)
def test_a_run_without_answers_has_clear_figures(empty: Run) -> None:
    found = summarize(empty)
    assert (found["throughput"], found["goodput"], found["output tokens"]) == (0.0, 0.0, 0)
    assert found.keys().isdisjoint({"ttft p50", "batch", "acceptance rate"})
    assert found["errors"] == len(empty.requests)
    assert b"null" not in msgspec.json.encode(found), "there is no NaN"


@given(st.lists(st.floats(0.0, 1e3), min_size=1))
def test_quantiles_are_numpys(values: list[float]) -> None:
    found = list(quantiles("x", values).values())
    assert found == pytest.approx([*np.percentile(values, [50, 90, 99]).tolist(), stats.tmean(values)])
    assert found[0] == pytest.approx(stats.scoreatpercentile(values, 50))


def test_repetitions_are_combined_figure_by_figure() -> None:
    runs = [run(record("a", 0.0, 1.0, seconds, client="x"), record("b", 0.0, 1.0)) for seconds in (2.0, 4.0, 8.0)]
    found = combine([summarize(one) for one in runs])
    assert found.num_runs == 3
    assert [figures["seconds"] for figures in (found.least, found.median, found.most)] == [2.0, 4.0, 8.0]
    assert found.median["client x: throughput"] == pytest.approx(0.5)
    assert found.most["itl p50"] == 7.0


def test_what_some_repetitions_lack_is_that_of_the_others() -> None:
    found = combine([summarize(run()), summarize(run(record("a", 0.0, 1.0), steps=[step(0, 1, 3)]))])
    assert (found.median["ttft p50"], found.median["batch"]) == (1.0, 3.0)


def test_the_table_shows_the_speed_up_over_static_and_no_empty_columns() -> None:
    static = replace(run(record("a", 0.0, 1.0, 4.0)), setup=Setup(policy="static"))
    title, rows = next(terminal_tables(collect([static, run(record("a", 0.0, 0.25, 1.0))])))
    assert title == "chat, 2 users"
    header = list(rows[0])
    assert header[:3] == ["policy", "× static", "tokens/s"]  # noqa: RUF001 -- the sign of multiplication
    assert [list(row.values())[:3] for row in rows] == [["static", "1.00×", "0.500"], ["fcfs", "4.00×", "2.00"]]  # noqa: RUF001
    assert not any("KV" in name or "errors" in name for name in header)


# -- predicted beside measured ---------------------------------------------------------------------------------------


def test_predicted_beside_measured() -> None:
    predicted = {"throughput": 110.0, "ttft p50": 0.9, "ttft p99": 4.0, "e2e p50": 1.08, "batch": 3.0}
    measured = {"throughput": 100.0, "ttft p50": 1.0, "ttft p99": 5.0, "itl p50": 1.0, "e2e p50": 1.0, "batch": 9.0}
    errors = replace(collect([run()])[0], predicted=predicted, measured=combine([measured])).errors
    assert {name: error.error for name, error in errors.items()} == {
        "throughput": pytest.approx(0.1),
        "ttft p50": pytest.approx(-0.1),
        "ttft p99": pytest.approx(-0.2),
        "e2e p50": pytest.approx(0.08),
    }
    assert [name for name, error in errors.items() if not error.is_within] == ["throughput", "ttft p50", "ttft p99"]


def test_nothing_measured_has_no_error() -> None:
    (cell,) = collect([run()])
    assert not replace(cell, predicted={"throughput": 1.0}, measured=combine([{"throughput": 0.0}])).errors


# -- fairness --------------------------------------------------------------------------------------------------------


@given(st.lists(st.just(0.0) | st.floats(1e-9, 1.0), min_size=1).filter(any))
def test_jains_index_lies_between_one_nth_and_one(shares: list[float]) -> None:
    assert 1 / len(shares) - 1e-9 <= jain(shares) <= 1 + 1e-9


@given(st.lists(st.floats(0.01, 1e3), min_size=1), st.floats(0.01, 100.0))
def test_jains_index_knows_no_unit_and_is_that_of_the_coefficient_of_variation(
    shares: list[float], factor: float
) -> None:
    assert jain([share * factor for share in shares]) == pytest.approx(jain(shares))
    assert jain(shares) == pytest.approx(1 / (1 + stats.variation(shares) ** 2))


def test_jains_index_of_equals_and_of_one_who_has_all() -> None:
    assert jain([3.0] * 7) == pytest.approx(1.0)
    assert jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


def test_a_client_that_waits_while_another_is_served_is_wronged() -> None:
    greedy = record("g", 0.0, *(0.1 + 0.2 * i for i in range(20)), client="greedy")
    modest = record("m", 0.0, 4.5, client="modest")
    assert fairness([greedy, modest], 4.5) == pytest.approx(0.5)


def test_a_client_that_asks_for_little_and_gets_it_is_not_wronged() -> None:
    greedy = [record(f"g{i}", 0.0, *(i + 0.1 * j for j in range(1, 10)), client="greedy") for i in range(4)]
    modest = record("m", 0.5, 0.7, 0.9, client="modest")
    assert fairness([*greedy, modest], 4.0) == pytest.approx(1.0)


def test_service_is_weighted_as_in_vtc() -> None:
    """Both wait throughout; a second's tokens are 10 of a prompt and 1 of output, against 10 and 6."""
    waits = [record(f"w{name}", 0.0, 1.5, client=name, num_output_tokens=0, num_prompt_tokens=0) for name in "xy"]
    less = record("a", 0.0, 0.5, client="x")
    more = record("b", 0.0, *(0.1 * i for i in range(1, 7)), client="y")
    first_second, second_second = jain([12.0 / 22.0, 1.0]), 1.0
    assert fairness([*waits, less, more], 2.0) == pytest.approx((first_second + second_second) / 2)


@pytest.mark.parametrize("records", [[], [record("a", 0.0, 3.0)], [record("a", 0, 1, client="x"), record("b", 2, 3)]])
def test_without_two_clients_at_once_there_is_nothing_to_be_fair_about(records: list[RequestRecord]) -> None:
    assert fairness(records, 3.0) is None
