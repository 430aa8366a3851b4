"""Arrivals against scipy's distributions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray
from scipy import stats

from shoal.loadtest.arrivals import closed_sessions, open_arrivals
from shoal.loadtest.records import Load, LoadTestError
from shoal.loadtest.workload import WorkloadRequest

Floats = NDArray[np.float64]
NUM = 20_000
SURE = 1e-3  # a p-value below this is no accident; seeds are fixed, so a test that passes always does


def request(name: str, arrival_time: float | None = None) -> WorkloadRequest:
    return WorkloadRequest(
        request_id=name,
        session=name,
        prompt="a",
        prompt_token_ids=[1],
        num_output_tokens=1,
        max_tokens=1,
        arrival_time=arrival_time,
    )


def arrival_times(load: Load, num: int) -> Floats:
    return np.array([due for due, _ in open_arrivals(load, [request(str(number)) for number in range(num)])])


def think_times(load: Load, num: int) -> Floats:
    sessions = closed_sessions(load, [request(str(number)) for number in range(num)])
    return np.array([arrival.seconds for (arrival,) in sessions])


def gaps(load: Load) -> Floats:
    return np.diff(arrival_times(load, NUM), prepend=0.0)


@pytest.mark.parametrize("rate", [0.5, 40.0])
def test_without_bursts_the_gaps_are_exponential(rate: float) -> None:
    assert stats.kstest(gaps(Load(rate=rate, seed=3)), stats.expon(scale=1 / rate).cdf).pvalue > SURE


@pytest.mark.parametrize("burstiness", [0.25, 2.0, 4.0])
def test_bursts_are_gamma_with_that_squared_coefficient_of_variation(burstiness: float) -> None:
    found = gaps(Load(rate=8.0, burstiness=burstiness, seed=5))
    expected = stats.gamma(1 / burstiness, scale=burstiness / 8.0)
    assert expected.var() / expected.mean() ** 2 == pytest.approx(burstiness)
    assert stats.kstest(found, expected.cdf).pvalue > SURE
    assert stats.kstest(found, stats.expon(scale=1 / 8.0).cdf).pvalue < SURE


def test_the_counts_in_windows_are_poisson_and_independent() -> None:
    times = arrival_times(Load(rate=10.0, seed=7), NUM)
    counts = np.histogram(times, np.arange(0, 1900, 0.5))[0]
    most = 12
    observed = np.bincount(np.minimum(counts, most), minlength=most + 1)
    poisson = stats.poisson(5.0)
    expected = np.append(poisson.pmf(range(most)), poisson.sf(most - 1)) * len(counts)
    assert stats.chisquare(observed, expected).pvalue > SURE
    assert abs(stats.pearsonr(counts[:-1], counts[1:]).statistic) < 4 / np.sqrt(len(counts))


def test_pauses_are_exponential_and_have_nothing_to_do_with_arrivals() -> None:
    load = Load(users=4, think_seconds=2.0, seed=3)
    pauses = think_times(load, NUM)
    assert stats.kstest(pauses, stats.expon(scale=2.0).cdf).pvalue > SURE
    assert abs(stats.pearsonr(pauses, gaps(Load(rate=1.0, seed=3))).statistic) < 4 / np.sqrt(NUM)
    assert not think_times(Load(users=4), 5).any()


def test_a_seed_gives_the_same_times_and_fewer_of_them_are_the_first() -> None:
    load = Load(rate=3.0, burstiness=2.0, seed=11)
    times = arrival_times(load, 50)
    assert np.array_equal(times, arrival_times(load, 50))
    assert np.allclose(times[:20], arrival_times(load, 20))
    assert not np.array_equal(times, arrival_times(Load(rate=3.0, burstiness=2.0, seed=12), 50))
    assert (np.diff(times) >= 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": -1.0}, "rate must be a finite number of at least 0, not -1"),
        ({"rate": float("nan")}, "rate must be"),
        ({"rate": float("inf")}, "rate must be"),
        ({"rate": 1.0, "burstiness": 0.0}, "burstiness must be a finite number above 0, not 0"),
        ({"rate": 1.0, "burstiness": -2.0}, "burstiness must be"),
        ({"users": 2, "think_seconds": -1.0}, "think_seconds must be a finite number of at least 0, not -1"),
        ({"users": -2}, "users must be a finite number of at least 0, not -2"),
        ({"users": 2, "seed": -1}, "seed must be a finite number of at least 0, not -1"),
        ({"users": 2, "rate": 2.0}, "either users or a rate"),
    ],
)
def test_a_load_out_of_range_is_refused_by_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LoadTestError, match=message):
        Load(**fields)


def test_without_a_rate_requests_are_due_when_the_workload_says() -> None:
    requests = [request("a", 2.0), request("b", 0.5)]
    assert list(open_arrivals(Load(), requests)) == [(0.5, requests[1]), (2.0, requests[0])]
    assert [due for due, _ in open_arrivals(Load(rate=4.0), requests)] == arrival_times(Load(rate=4.0), 2).tolist()
    with pytest.raises(LoadTestError, match="request 'c' has no arrival_time"):
        open_arrivals(Load(), [*requests, request("c")])


def test_sessions_keep_the_order_of_the_workload() -> None:
    sessions = closed_sessions(Load(users=1), [replace(request(name), session=name[0]) for name in ("a1", "b1", "a2")])
    assert [[arrival.request.request_id for arrival in session] for session in sessions] == [["a1", "a2"], ["b1"]]


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (Load(users=1), "1 user"),
        (Load(users=32, think_seconds=1.5), "32 users who think for 1.5 s"),
        (Load(rate=12.5), "12.5 requests/s"),
        (Load(rate=8, burstiness=4), "8 requests/s, burstiness 4"),
        (Load(), "as recorded"),
    ],
)
def test_loads_in_words(load: Load, words: str) -> None:
    assert str(load) == words
