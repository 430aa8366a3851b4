"""What speculation gave, against what was expected of it."""

from __future__ import annotations

import pytest

from shoal.model.speculation.costs import StepCosts
from shoal.model.speculation.yields import Yields


@pytest.fixture
def costs() -> StepCosts:
    found = StepCosts()
    found.observe(4, 1.0)
    return found


def step(yields: Yields, costs: StepCosts, *, seconds: float, guessing: float = 0.0, accepted: int = 4) -> None:
    """Four requests, with a token drafted for each."""
    yields.proposed(guessing)
    yields.took(8, seconds)
    yields.verified(3, accepted - 1)
    yields.verified(1, 1)
    yields.settle(costs)


def test_what_came_is_set_against_what_was_expected(costs: StepCosts) -> None:
    yields = Yields()
    yields.expect(2.0)
    step(yields, costs, seconds=1.0)
    assert yields.share(4) == 1.0
    for _ in range(100):
        step(yields, costs, seconds=1.0, guessing=1.0)
    assert yields.share(4) == pytest.approx(0.5, abs=0.001), "twice the tokens in twice the time, guessing included"
    assert yields.share(5) == yields.share(4)
    assert yields.share(8) == 1.0, "of many more requests nothing is known"


def test_one_step_that_was_held_up_says_little(costs: StepCosts) -> None:
    yields = Yields()
    yields.expect(2.0)
    step(yields, costs, seconds=1000.0)
    assert yields.share(4) > 0.9


def test_plain_steps_and_trials_say_nothing(costs: StepCosts) -> None:
    yields = Yields()
    yields.expect(None)
    step(yields, costs, seconds=5.0)
    yields.expect(2.0)
    yields.took(4, 5.0)
    yields.settle(costs)
    yields.settle(costs)
    yields.verified(4, 4)  # in a step with a prompt, which is not timed
    yields.settle(costs)
    assert yields.share(4) == 1.0


def test_what_was_seen_is_doubted_in_time(costs: StepCosts) -> None:
    yields = Yields()
    yields.expect(2.0)
    for _ in range(20):
        step(yields, costs, seconds=2.0)
    seen = yields.share(4)
    for _ in range(60):
        yields.fade()
    assert seen < 0.6
    assert yields.share(4) > 0.97
