"""Arrivals against scipy's distributions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from shoal.loadtest.arrivals import arrival_times, check_load, due_times, think_times
from shoal.loadtest.errors import LoadTestError
from shoal.loadtest.records import Load
from shoal.loadtest.workload import WorkloadRequest

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


def gaps(load: Load) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
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
    ("load", "message"),
    [
        (Load(rate=-1.0), "rate must be a finite number above 0, not -1.0"),
        (Load(rate=float("nan")), "rate must be"),
        (Load(rate=float("inf")), "rate must be"),
        (Load(rate=1.0, burstiness=0.0), "burstiness must be a finite number above 0, not 0.0"),
        (Load(rate=1.0, burstiness=-2.0), "burstiness must be"),
        (Load(users=2, think_seconds=-1.0), "think_seconds must be a finite number of at least 0, not -1.0"),
        (Load(users=-2), "users must be at least 0, not -2"),
        (Load(users=2, seed=-1), "seed must be at least 0, not -1"),
        (Load(users=2, rate=2.0), "either users or a rate"),
        (Load(), "request 'b' of the workload has no arrival_time"),
    ],
)
def test_a_load_out_of_range_is_refused_by_field(load: Load, message: str) -> None:
    with pytest.raises(LoadTestError, match=message):
        check_load(load, [request("a", 1.0), request("b")])


def test_a_rate_of_zero_has_no_arrivals() -> None:
    with pytest.raises(LoadTestError, match="rate must be a finite number above 0, not 0"):
        arrival_times(Load(), 3)


def test_without_a_rate_a_replay_is_meant() -> None:
    requests = [request("a", 2.0), request("b", 0.5)]
    assert due_times(Load(), requests) == [2.0, 0.5]
    assert due_times(Load(rate=4.0), requests) == arrival_times(Load(rate=4.0), 2).tolist()
