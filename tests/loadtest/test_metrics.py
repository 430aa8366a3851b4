"""Figures of runs against figures that were worked out by hand, and against numpy and scipy."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from shoal.loadtest.fairness import fairness, jain
from shoal.loadtest.metrics import Slo, combine, quantiles, summarize
from shoal.loadtest.records import Load, RequestRecord, Run, Setup
from shoal.loadtest.report_data import collect
from shoal.loadtest.steps import EngineRequest, Row, Step
from shoal.loadtest.storage import to_json
from shoal.loadtest.table import tables


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
    return Run(setup=Setup(policy="fcfs"), workload="chat", load=Load(users=2), requests=list(records), **values)  # type: ignore[arg-type]


def step(start: float, seconds: float, num_working: int, num_padding: int = 0, **values: int) -> Step:
    rows = [Row(f"r{i}", i, 1, 0, True, i >= num_working) for i in range(num_working + num_padding)]
    figures = {
        "num_waiting": 0,
        "num_blocks": 10,
        "num_used_blocks": 4,
        "num_kv_tokens": 32,
        "num_pairs": 9,
        "num_keys": 9,
    }
    return Step(start, seconds, seconds, rows, **figures | {"num_preemptions": 0} | values)


def test_throughput_and_latencies_count_from_the_first_request_to_the_end_of_the_last() -> None:
    found = summarize(run(record("a", 1.0, 2.0, 2.5, 3.5), record("b", 2.0, 4.0, 6.0), generator_cpu_seconds=0.5))
    assert found.seconds == 5.0
    assert found.throughput == pytest.approx(1.0)  # 5 tokens
    assert found.request_rate == pytest.approx(0.4)
    assert found.ttft is not None and found.ttft.mean == pytest.approx(1.5)
    assert found.itl is not None and found.itl.p50 == pytest.approx(1.0)  # of 0.5, 1, 2
    assert found.tpot is not None and found.tpot.mean == pytest.approx((0.75 + 2.0) / 2)
    assert found.e2e is not None and found.e2e.mean == pytest.approx((2.5 + 4.0) / 2)
    assert found.generator_cores == pytest.approx(0.1)
    assert found.generator_cores_per_1000 == pytest.approx(100.0)


def test_goodput_needs_both_objectives() -> None:
    good = record("good", 0.0, 0.5, 0.55)
    late = record("late", 0.0, 1.5, 1.55)
    slow = record("slow", 0.0, 0.5, 2.0)
    one_token = record("one", 0.0, 0.5)
    failed = record("failed", 0.0, error="HTTP 500")
    found = summarize(run(good, late, slow, one_token, failed), Slo(ttft=1.0, tpot=0.1))
    assert found.goodput_share == pytest.approx(2 / 5)
    assert found.goodput == pytest.approx(2 / 2.0)
    assert found.num_errors == 1


def test_queueing_time_is_the_engines() -> None:
    ways = {"a": EngineRequest("a", 1.0, 1.25, 3.0), "b": EngineRequest("b", 1.0, None, None)}
    found = summarize(run(record("a", 0.5, 2.0), engine_requests=ways))
    assert found.queueing is not None and found.queueing.p99 == pytest.approx(0.25)


def test_steps_are_weighted_by_time() -> None:
    steps = [step(0.0, 1.0, 1, 3, num_preemptions=2), step(1.0, 3.0, 3, num_used_blocks=8, num_kv_tokens=128)]
    engine = summarize(run(steps=steps, block_size=16)).engine
    assert engine is not None
    assert engine.batch_sizes == pytest.approx((0.0, 0.25, 0.0, 0.75))
    assert engine.batch_size == pytest.approx(2.5)
    assert engine.padding_rows == pytest.approx(0.75)
    assert engine.padding_share == pytest.approx(0.75 / 3.25)
    assert engine.tokens_per_step == pytest.approx(3.25)
    assert engine.kv_usage == pytest.approx(0.25 * 0.4 + 0.75 * 0.8)
    assert engine.kv_usage_peak == pytest.approx(0.8)
    assert engine.kv_utilisation == pytest.approx((0.25 * 32 + 0.75 * 128) / (0.25 * 64 + 0.75 * 128))
    assert engine.kv_waste == pytest.approx(0.25 * 2 / 3.25)  # blocks: two are empty for a quarter of the time
    assert engine.num_preemptions == 2


def test_tokens_that_were_cached_and_accepted() -> None:
    found = summarize(
        run(
            record("a", 0.0, 1.0, num_cached_tokens=5, num_accepted_tokens=3, num_rejected_tokens=1),
            record("b", 0.0, 1.0),
        )
    )
    assert found.cached_share == pytest.approx(0.25)
    assert found.acceptance_rate == pytest.approx(0.75)


def test_clients_and_priorities_are_told_apart_where_there_are_several() -> None:
    found = summarize(run(record("a", 0.0, 1.0, client="x"), record("b", 0.0, 3.0, 4.0, client="y", priority=1)))
    assert found.clients["x"].ttft is not None and found.clients["x"].ttft.p50 == 1.0
    assert found.clients["y"].throughput == pytest.approx(0.5)
    assert list(found.priorities) == [0, 1]
    assert summarize(run(record("a", 0.0, 1.0))).clients == {}


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
    assert (found.throughput, found.goodput, found.num_output_tokens) == (0.0, 0.0, 0)
    assert found.ttft is None and found.engine is None and found.acceptance_rate is None
    assert found.num_errors == len(empty.requests)
    json.loads(to_json(found))
    json.loads(to_json(combine([found, summarize(run(record("a", 0.0, 1.0)))])))


@given(st.lists(st.floats(0.0, 1e3), min_size=1))
def test_quantiles_are_numpys(values: list[float]) -> None:
    found = quantiles(values)
    assert found is not None
    assert [found.p50, found.p90, found.p99] == pytest.approx(np.percentile(values, [50, 90, 99]).tolist())
    assert found.p50 == pytest.approx(stats.scoreatpercentile(values, 50))
    assert found.mean == pytest.approx(stats.tmean(values))


def test_repetitions_are_combined_figure_by_figure() -> None:
    runs = [run(record("a", 0.0, 1.0, seconds, client="x"), record("b", 0.0, 1.0)) for seconds in (2.0, 4.0, 8.0)]
    found = combine([summarize(one) for one in runs])
    assert found.num_runs == 3
    assert [figures.seconds for figures in (found.least, found.median, found.most)] == [2.0, 4.0, 8.0]
    assert found.median.clients["x"].throughput == pytest.approx(0.5)
    assert found.most.itl is not None and found.most.itl.p50 == 7.0


def test_what_some_repetitions_lack_is_that_of_the_others() -> None:
    found = combine([summarize(run()), summarize(run(record("a", 0.0, 1.0), steps=[step(0, 1, 3)]))])
    assert found.median.ttft is not None and found.median.ttft.p50 == 1.0
    assert found.median.engine is not None and found.median.engine.batch_sizes == (0.0, 0.0, 0.0, 1.0)


def test_combining_one_run_changes_nothing() -> None:
    one = summarize(run(record("a", 0.0, 1.0, client="x"), record("b", 0.0, 1.5, client="y"), steps=[step(0, 1, 2, 1)]))
    found = combine([one])
    assert asdict(found.median) == asdict(found.least) == asdict(found.most) == asdict(one)


def test_the_table_shows_the_speed_up_over_static_and_no_empty_columns() -> None:
    static = replace(run(record("a", 0.0, 1.0, 4.0)), setup=Setup(policy="static"))
    title, header, *lines = next(tables(collect([static, run(record("a", 0.0, 0.25, 1.0))]))).splitlines()
    assert title == "chat, 2 users (times in ms)"
    assert header.split()[:4] == ["policy", "tokens/s", "x", "static"]
    assert [line.split()[:3] for line in lines] == [["static", "0.5", "1"], ["fcfs", "2", "4"]]
    assert "KV used" not in header and "errors" not in header
    assert len({len(line) for line in (header, *lines)}) == 1


# -- fairness --------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.0, 1e12), min_size=1))
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
