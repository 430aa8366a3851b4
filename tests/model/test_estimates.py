"""What is learnt of acceptance and of costs."""

from __future__ import annotations

import random

import pytest

from shoal.model.speculation.estimates import Acceptance, Costs, Mean


def test_a_mean_weighs_observations_and_takes_a_prior_in() -> None:
    mean = Mean()
    assert mean.value(0.3, 2.0) == pytest.approx(0.3)
    mean.add(4.0, 2.0)
    assert mean.value() == pytest.approx(2.0)
    assert mean.value(5.0, 1.0) == pytest.approx(3.0)


def test_a_mean_forgets() -> None:
    mean = Mean()
    for _ in range(300):
        mean.add(1.0, 1.0)
    for _ in range(300):
        mean.add(3.0, 1.0)
    assert mean.value() == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize("chance", [0.2, 0.5, 0.9])
def test_rates_come_close_to_the_chances(chance: float) -> None:
    """The first token of two is accepted with this chance, the second with another one if the first was."""
    rng = random.Random(0)
    acceptance, found = Acceptance(), []
    for _ in range(3000):
        num_accepted = (1 + (rng.random() < 1 - chance)) if rng.random() < chance else 0
        acceptance.count(2, num_accepted)
        found.append(acceptance.rates(acceptance))
    first, further = (sum(rates) / 2800 for rates in zip(*found[200:], strict=True))
    assert first == pytest.approx(chance, abs=0.03)
    assert further == pytest.approx(1 - chance, abs=0.1)


def test_a_request_of_which_little_is_known_is_like_all() -> None:
    every, own = Acceptance(), Acceptance()
    assert own.rates(every) == (0.5, 0.5)
    for _ in range(100):
        every.count(4, 4)
    assert min(own.rates(every)) > 0.9
    for _ in range(50):
        own.count(1, 0)
    assert own.rates(every)[0] < 0.3


def test_further_tokens_are_as_good_as_the_first_once_they_were_not_drafted_for_long() -> None:
    acceptance = Acceptance()
    for _ in range(20):
        acceptance.count(2, 1)
    assert acceptance.rates(acceptance)[1] < 0.3
    for _ in range(600):
        acceptance.count(1, 1)
    first, further = acceptance.rates(acceptance)
    assert further == pytest.approx(first, abs=0.01)


def test_a_plain_step_is_known_by_its_number_of_requests() -> None:
    costs = Costs()
    costs.step(4, 0, 1.0)
    costs.step(4, 4, 9.0)
    assert costs.knows(4)
    assert not costs.knows(5)
    assert costs.plain(4) == 1.0


def test_a_cost_follows_what_is_seen_and_is_not_thrown_by_one_slow_step() -> None:
    costs = Costs()
    for _ in range(50):
        costs.step(4, 0, 1.0)
    costs.step(4, 0, 1000.0)
    assert costs.plain(4) < 1.05
    for _ in range(300):
        costs.step(4, 0, 3.0)
    assert costs.plain(4) == pytest.approx(3.0, rel=0.01)


def test_drafted_rows_are_learnt_where_they_were_drafted() -> None:
    """A step of eight requests and eight drafted tokens says nothing of steps of sixteen requests."""
    costs = Costs()
    for num_requests in (8, 12, 16):
        costs.step(num_requests, 0, float(num_requests))
    unknown = costs.row(16)
    for _ in range(100):
        costs.step(8, 16, 10.0)
        costs.step(12, 24, 15.0)
    assert costs.row(8) == pytest.approx(2 / 16, rel=0.02)
    assert costs.row(12) == pytest.approx(3 / 24, rel=0.02)
    assert costs.row(16) == unknown


def test_drafted_rows_are_not_learnt_before_a_plain_step_nor_from_one_slow_step() -> None:
    costs = Costs()
    costs.step(1, 4, 100.0)
    costs.step(1, 0, 1.0)
    unknown = costs.row(1)
    for _ in range(50):
        costs.step(1, 4, 1.0 + 4 * unknown)
    costs.step(1, 4, 1000.0)
    assert costs.row(1) == pytest.approx(unknown, rel=0.2)


def test_the_time_of_drafting_is_that_of_the_nearest_load() -> None:
    costs = Costs()
    assert costs.drafting(3) == 0.0
    costs.proposal([4, 2, 1], 8.0)
    assert costs.drafting(3) == costs.drafting(64) == 2.0
    costs.proposal([1] * 32, 20.0)
    assert costs.drafting(64) == 20.0
    assert costs.drafting(1) == 2.0
