"""What is known of the chance of a drafted token."""

from __future__ import annotations

import random

import pytest

from shoal.model.speculation.acceptance import Acceptance


def test_nothing_is_known_before_anything_was_seen() -> None:
    acceptance = Acceptance(2)
    assert acceptance.num_seen == 0
    assert acceptance.rate(0, 0.3) == pytest.approx(0.3)


@pytest.mark.parametrize("chance", [0.2, 0.5, 0.9])
def test_a_rate_comes_close_to_the_chance(chance: float) -> None:
    rng = random.Random(0)
    acceptance = Acceptance(1)
    rates = []
    for _ in range(2000):
        accepted = rng.random() < chance
        acceptance.count(0, int(accepted), int(not accepted))
        rates.append(acceptance.rate(0, 0.5))
    assert sum(rates[200:]) / 1800 == pytest.approx(chance, abs=0.03)


def test_a_request_of_which_little_is_known_is_like_the_others() -> None:
    acceptance = Acceptance(2)
    for _ in range(100):
        acceptance.count(0, 4, 1)
    assert acceptance.rate(1, 0.5) == pytest.approx(0.8, abs=0.02)
    for _ in range(50):
        acceptance.count(1, 0, 1)
    assert acceptance.rate(1, 0.5) < 0.25
    assert acceptance.rate(0, 0.5) > 0.7
    acceptance.join(1)
    assert acceptance.rate(1, 0.5) > 0.5, "another request has the row"


def test_what_was_seen_long_ago_is_forgotten() -> None:
    acceptance = Acceptance(1)
    for _ in range(20):
        acceptance.count(0, 0, 1)
    assert acceptance.rate(0, 0.9) < 0.15
    for _ in range(600):
        acceptance.count(0, 0, 0)  # proposals that say nothing of such tokens
    assert acceptance.rate(0, 0.9) == pytest.approx(0.9, abs=0.02)


def test_a_rest_takes_from_what_is_known_of_a_request_but_not_of_all() -> None:
    acceptance = Acceptance(2)
    for _ in range(30):
        acceptance.count(0, 1, 0)
        acceptance.count(1, 0, 1)
    seen, before = acceptance.num_seen, acceptance.rate(0, 0.5)
    for _ in range(10):
        acceptance.fade(0)
    assert acceptance.num_seen == seen
    assert before > 0.7
    assert acceptance.rate(0, 0.5) == pytest.approx(0.5, abs=0.05)
