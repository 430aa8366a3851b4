"""What is learnt of acceptance and of costs."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.optimize import nnls

from shoal.model.speculation.estimates import Acceptance, Cost, Costs, Mean


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


def test_a_cost_is_that_of_least_squares() -> None:
    """The oracle is scipy; its last row is the observation of 0 that a cost begins with."""
    rng = random.Random(0)
    for _ in range(50):
        cost, rows, costs = Cost(), [], []
        true_fixed, true_each = rng.uniform(-3, 3), rng.uniform(-1, 1)
        for age in reversed(range(30)):
            groups, things = rng.randint(1, 4), rng.randint(4, 20)
            observed = true_fixed * groups + true_each * things + rng.gauss(0, 0.1)
            cost.add(groups, things, observed)
            weight = 0.98 ** (age / 2)
            rows.append((groups * weight, things * weight))
            costs.append(observed * weight)
        assert cost.parts() == pytest.approx(nnls(np.array([*rows, (1, 0)]), np.array([*costs, 0]))[0], abs=1e-6)


def test_the_fixed_part_of_a_cost_is_found_once_groups_differ_in_size() -> None:
    cost = Cost()
    assert cost.parts() == (0, 0)
    cost.add(1, 2, 3.0)
    assert cost.parts() == pytest.approx((0, 1.5))
    for _ in range(50):
        cost.add(1, 2, 3.0)
        cost.add(1, 8, 6.0)
    assert cost.parts() == pytest.approx((2, 0.5), abs=0.2)


def test_a_plain_step_is_known_by_its_number_of_requests() -> None:
    costs = Costs()
    costs.step(4, 0, 0, 1.0)
    costs.step(4, 4, 4, 9.0)
    assert costs.knows(4)
    assert not costs.knows(5)
    assert costs.plain(4) == 1.0


def test_a_cost_follows_what_is_seen_and_is_not_thrown_by_one_slow_step() -> None:
    costs = Costs()
    for _ in range(50):
        costs.step(4, 0, 0, 1.0)
    costs.step(4, 0, 0, 1000.0)
    assert costs.plain(4) < 1.05
    for _ in range(300):
        costs.step(4, 0, 0, 3.0)
    assert costs.plain(4) == pytest.approx(3.0, rel=0.01)


def test_verification_is_learnt_where_tokens_were_drafted() -> None:
    """A step of eight requests and sixteen drafted tokens says nothing of steps of sixteen requests."""
    costs = Costs()
    for num_requests in (8, 12, 16):
        costs.step(num_requests, 0, 0, float(num_requests))
    unknown = costs.verification(16)
    for _ in range(100):
        costs.step(8, 8, 16, 10.0)
        costs.step(12, 12, 24, 15.0)
    assert costs.verification(8) == pytest.approx((0, 2 / 16), abs=0.01)
    assert costs.verification(12) == pytest.approx((0, 3 / 24), abs=0.01)
    assert costs.verification(16) == unknown


def test_verification_is_not_learnt_before_a_plain_step_nor_from_one_slow_step() -> None:
    costs = Costs()
    costs.step(1, 1, 4, 100.0)
    costs.step(1, 0, 0, 1.0)
    _, unknown = costs.verification(1)
    for _ in range(50):
        costs.step(1, 1, 4, 1.0 + 4 * unknown)
    costs.step(1, 1, 4, 1000.0)
    assert sum(costs.verification(1)) == pytest.approx(unknown, rel=0.2)


def test_the_time_of_drafting_is_learnt_relative_to_a_plain_step() -> None:
    costs = Costs()
    costs.step(4, 0, 0, 1.0)
    costs.step(64, 0, 0, 10.0)
    assert costs.drafting(4) == (0, 0)
    costs.proposal(4, 4, 0.8)
    assert costs.drafting(4) == pytest.approx((0, 0.2))
    assert costs.drafting(64) == pytest.approx((0, 2.0))


def test_a_draft_that_was_interrupted_is_forgotten_by_trials() -> None:
    """A proposal took a hundred times as long as it would: the second of two, or the very first of all."""
    costs, interrupted = Costs(), Costs()
    for each in (costs, interrupted):
        each.step(8, 0, 0, 1.0)
    costs.proposal(8, 1, 0.1)
    costs.proposal(8, 1, 10.0)
    assert sum(costs.drafting(8)) < 0.12
    interrupted.proposal(8, 1, 10.0)
    interrupted.proposal(8, 2, 0.2)
    assert sum(interrupted.drafting(8)) < 0.15


def test_catching_up_is_what_it_comes_to_in_the_long_run() -> None:
    """The first proposal of all has whole prompts to read, and each further one what is new."""
    costs = Costs()
    assert costs.catching_up(8) == 0
    costs.caught_up(8, 5.0)
    assert costs.catching_up(8) < 0.2
    for _ in range(300):
        costs.caught_up(8, 0.5)
    assert costs.catching_up(8) == pytest.approx(0.5, abs=0.02)
    assert costs.catching_up(64) == 0
