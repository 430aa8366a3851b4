"""How long proposals become, given what steps cost and what was accepted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from shoal.model.speculation.costs import ProposalCosts, StepCosts
from shoal.model.speculation.length import ADAPTIVE_MOST, AdaptiveLength, FixedLength


def test_costs_are_interpolated_and_carefully_extrapolated() -> None:
    costs = StepCosts()
    assert costs.predict(3) is None
    costs.observe(2, 1.0)
    assert costs.predict(1) is None
    assert costs.predict(2) == costs.predict(4) == 1.0
    assert costs.predict(5) is None
    costs.observe(6, 3.0)
    assert costs.predict(4) == pytest.approx(2.0)
    assert costs.predict(8) == pytest.approx(4.0)
    costs.observe(8, 2.0)
    assert costs.predict(10) == 2.0


def test_a_cost_follows_what_is_seen_and_is_not_thrown_by_one_slow_step() -> None:
    costs = StepCosts()
    for _ in range(50):
        costs.observe(4, 1.0)
    costs.observe(4, 1000.0)
    assert costs.predict(4) == pytest.approx(1.05)
    for _ in range(100):
        costs.observe(4, 3.0)
    assert costs.predict(4) == pytest.approx(3.0, rel=0.01)


def test_what_proposals_cost_is_told_by_the_nearest_number_of_requests() -> None:
    costs = ProposalCosts()
    assert costs.predict(3, 8) == 0.0
    costs.observe(4, 2, 3.0)
    assert costs.predict(4, 1) == costs.predict(60, 2) == 3.0
    assert costs.predict(4, 5) is None, "shorter ones have to show first"
    costs.observe(4, 4, 5.0)
    costs.observe(32, 1, 20.0)
    assert costs.predict(5, 6) == pytest.approx(7.0)
    assert costs.predict(19, 1) == 20.0


def test_a_cost_that_was_once_seen_high_is_doubted_until_it_is_seen_again() -> None:
    """Where guesses looked too dear in a bad moment, they are tried again some time."""
    rule, _, _ = play(lambda n: 1.0 if n == 1 else 10.0, draft=0.02, rates=[0.9], steps=50)
    found = serve_one(rule, 10_000, lambda *_: 1.0, draft=0.02)
    assert np.mean(found[-200:]) > 4


def test_large_steps_of_about_the_same_size_share_their_cost() -> None:
    costs = StepCosts()
    for size in range(500, 520):
        costs.observe(size, 1.0)
    assert len(costs._sizes) <= 2


def test_fixed_is_fixed() -> None:
    assert FixedLength(3).lengths([4, 7], num_others=2) == [3, 3]


def play(
    seconds: Callable[[int], float], *, draft: float, rates: list[float], steps: int = 600
) -> tuple[AdaptiveLength, list[list[int]], float]:
    """Serve requests whose guesses are right at these rates on a machine where a step of n tokens takes `seconds(n)`
    and drafting a token for all takes `draft`; the lengths step by step, and the speed over that without guessing."""
    rng = np.random.default_rng(0)
    rule, rows = AdaptiveLength(64), list(range(len(rates)))
    for row in rows:
        rule.join(row)
    history, tokens, time = [], 0, 0.0
    for _ in range(steps):
        lengths = rule.lengths(rows, num_others=0)
        history.append(lengths)
        if any(lengths):
            rule.proposed(lengths, draft * max(lengths))
            time += draft * max(lengths)
        num_tokens = len(rows) + sum(lengths)
        rule.took(num_tokens, seconds(num_tokens))
        time += seconds(num_tokens)
        for row, length in zip(rows, lengths, strict=True):
            accepted = 0
            while accepted < length and rng.random() < rates[row]:
                accepted += 1
            tokens += accepted + 1
            if length:
                rule.verified(row, length, accepted)
    return rule, history, tokens / time * seconds(len(rows)) / len(rows)


def serve_one(
    rule: AdaptiveLength,
    steps: int,
    seconds: Callable[[int, int], float],
    *,
    draft: float,
    accept: Callable[[int], int] = lambda length: length,
) -> list[int]:
    """Serve one request on a machine where step i takes `seconds(i, length)`, and of so many drafted tokens
    `accept(length)` are accepted; the lengths step by step."""
    found = []
    for step in range(steps):
        (length,) = rule.lengths([0], num_others=0)
        if length:
            rule.proposed([length], draft * length)
        rule.took(1 + length, seconds(step, length))
        if length:
            rule.verified(0, length, accept(length))
        found.append(length)
    return found


def mean_length(history: list[list[int]]) -> float:
    return float(np.mean(history[len(history) // 2 :]))


def test_where_rows_are_free_and_guesses_are_right_proposals_are_long() -> None:
    _, history, speed_up = play(lambda n: 1.0 + 0.01 * n, draft=0.02, rates=[0.95])
    assert mean_length(history) > 0.8 * ADAPTIVE_MOST
    assert speed_up > 3


def test_where_each_row_costs_its_share_nothing_is_proposed_and_little_is_lost() -> None:
    """A busy server: a step takes as long as it has tokens."""
    _, history, speed_up = play(float, draft=0.1, rates=[0.7] * 32)
    assert mean_length(history) < 0.1
    assert speed_up > 0.97


def test_where_guesses_are_wrong_nothing_is_proposed_and_little_is_lost() -> None:
    _, history, speed_up = play(lambda n: 1.0 + 0.05 * n, draft=0.1, rates=[0.05], steps=2000)
    assert mean_length(history) < 0.2
    assert speed_up > 0.97


def test_one_request_may_be_worth_guessing_for_beside_one_that_is_not() -> None:
    _, history, speed_up = play(lambda n: 1.0 + 0.2 * n, draft=0.0, rates=[0.95, 0.05])
    late = np.mean(history[300:], axis=0)
    assert late[0] > 3 * late[1] + 1
    assert speed_up > 1.2


def test_what_has_become_worth_it_is_found_out() -> None:
    rule, history, _ = play(lambda n: 1.0 + 0.05 * n, draft=0.02, rates=[0.02], steps=500)
    assert mean_length(history) < 0.3
    found = serve_one(rule, 1500, lambda _, length: 1.05 + 0.05 * length, draft=0.02)
    assert np.mean(found[-200:]) > 4


def test_long_proposals_that_were_seen_to_be_dear_are_tried_again() -> None:
    """A size that nobody asks for any more shows nothing of what it costs by now."""

    def seconds(step: int, length: int) -> float:
        return 1.0 + 0.02 * length + (5.0 if step < 200 and length > 4 else 0.0)

    found = serve_one(AdaptiveLength(1, most=16), 3000, seconds, draft=0.001)
    assert np.mean(found[100:200]) < 6
    assert np.mean(found[-500:]) > 0.8 * 16


def test_where_the_first_guess_is_hard_and_further_ones_are_sure_proposals_are_long() -> None:
    """As where a text is looked up: a first token that is right says that the place is the right one."""
    rng = np.random.default_rng(0)
    found = serve_one(
        AdaptiveLength(1, most=16),
        1000,
        lambda _, length: 1.0 + 0.08 * length,
        draft=0.001,
        accept=lambda length: length if rng.random() < 0.6 else 0,
    )
    # With one chance for all tokens, that of 16 accepted in a row would be next to nothing.
    assert np.mean(found[-500:]) > 12


def test_the_best_length_is_close_to_the_best_fixed_one() -> None:
    def seconds(n: int) -> float:
        return 1.0 + 0.12 * n

    _, _, adaptive = play(seconds, draft=0.08, rates=[0.75] * 2, steps=3000)

    def fixed(k: int) -> float:
        expected = (1 - 0.75 ** (k + 1)) / 0.25
        return expected / (seconds(2 * (k + 1)) + 0.08 * k) * seconds(2)

    assert adaptive > 0.95 * max(fixed(k) for k in range(ADAPTIVE_MOST + 1))


def at_rest() -> AdaptiveLength:
    """With 32 requests, and nothing lost that is not made up for."""
    rule, _, _ = play(float, draft=0.1, rates=[0.1] * 32, steps=40)
    for _ in range(1000):
        rule.took(32, 32.0)
    while not rule.rests(32):
        rule.lengths(list(range(32)), num_others=0)
    return rule


def test_what_guesses_have_cost_is_made_up_for_before_the_next() -> None:
    """However dear catching up is, whoever comes and goes: little of the time is lost."""
    rule, rows = AdaptiveLength(64), list(range(16))
    lost, num_trials, is_on = 0.0, 0, False
    for step in range(20_000):
        rule.join(step % 16)
        lengths = [0] * 16 if rule.rests(16) else rule.lengths(rows, num_others=0)
        if any(lengths):
            num_trials += not is_on
            rule.caught_up(5.0 * (not is_on))
            lost += 5.0 * (not is_on) + 0.05 * sum(lengths)
        is_on = any(lengths)
        rule.took(16 + sum(lengths), 1.0 + 0.05 * sum(lengths))
        for row, length in zip(rows, lengths, strict=True):
            if length:
                rule.verified(row, length, 0)
    assert num_trials > 10
    assert lost < 0.02 * 20_000


def test_a_rest_holds_for_about_as_many_requests_whosoever_they_are() -> None:
    rule = at_rest()
    assert rule.rests(39)
    assert not rule.rests(48), "much else may pay now"
    rests = 0
    while rule.rests(30):
        rests += 1
    assert rests < 512, "a rest ends"


def test_a_rest_ends_when_half_of_the_requests_are_others() -> None:
    rule = at_rest()
    for row in range(15):
        rule.join(row)
    assert rule.rests(32)
    rule.join(15)
    assert not rule.rests(32)


def test_bad_luck_of_one_request_is_no_reason_to_give_up() -> None:
    """The bundled pair at temperature 0.8: a gain of a third at best, of which single steps tell little."""
    costs = {1: 1.0, 2: 1.22, 3: 1.38, 4: 1.46, 5: 1.65, 6: 1.76, 7: 1.86, 8: 1.96, 9: 2.05}
    _, history, speed_up = play(costs.__getitem__, draft=0.077, rates=[0.65], steps=4000)
    best = max(sum(0.65**i for i in range(k + 1)) / (costs[k + 1] + 0.077 * k) for k in range(ADAPTIVE_MOST + 1))
    assert best > 1.3
    assert speed_up > 0.93 * best
    assert np.mean([length == 0 for (length,) in history]) < 0.25


def test_what_only_looks_worth_it_is_given_up() -> None:
    """Steps of as many tokens are cheap when they are those of other requests, again and again: no mean tells that."""
    rule, rows = AdaptiveLength(64), list(range(8))
    tokens = time = 0.0
    for _ in range(200):
        for size in (8, 12, 16, 20, 24):
            for _ in range(4):
                rule.took(size, 1.0 + 0.01 * size)
        for _ in range(20):
            lengths = rule.lengths(rows, num_others=0)
            if any(lengths):
                rule.proposed(lengths, 0.0)
            seconds = 1.08 + 0.2 * sum(lengths)
            rule.took(len(rows) + sum(lengths), seconds)
            time += seconds
            for row, length in zip(rows, lengths, strict=True):
                tokens += 1 + length
                if length:
                    rule.verified(row, length, length)
    assert tokens / time / len(rows) * 1.08 > 0.92


def test_while_little_is_known_one_is_tried() -> None:
    rule, rows = AdaptiveLength(64), list(range(32))
    rule.took(32, 1.0)
    tried = rule.lengths(rows, num_others=0)
    assert sum(map(bool, tried)) == 1
    for _ in range(4):
        rule.verified(0, 4, 4)
    rule.took(48, 1.0)
    rule.took(64, 1.0)
    for _ in range(5):
        later = rule.lengths(rows, num_others=0)
    assert all(later)
