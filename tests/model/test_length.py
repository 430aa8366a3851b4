"""How long proposals become, given what steps cost and what was accepted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from shoal.model.speculation.config import ADAPTIVE_MOST
from shoal.model.speculation.length import AdaptiveLength, FixedLength


def test_fixed_is_fixed() -> None:
    rule = FixedLength(3)
    assert not rule.rests()
    assert rule.lengths([4, 7]) == [3, 3]


class Machine:
    """Serves requests 0 to n - 1 by a rule, on a virtual clock.

    Attributes:
        seconds: time of a step by its number of requests and of drafted tokens.
        drafting: seconds of drafting a token for each request.
        catching_up: seconds of the first proposal after a step without one.
        accepts: whether the token of this row at this place of a proposal is accepted.
        noise: what the rule hears of a step's or a proposal's time, relative to the time that counts.
        history: lengths, step by step.
        time, tokens: in all.
    """

    def __init__(
        self,
        rule: AdaptiveLength,
        seconds: Callable[[int, int], float],
        accepts: Callable[[int, int], bool],
        *,
        drafting: float,
        catching_up: float = 0.0,
        noise: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.rule, self.seconds, self.accepts = rule, seconds, accepts
        self.drafting, self.catching_up, self.noise = drafting, catching_up, noise
        self.history: list[list[int]] = []
        self.time, self.tokens = 0.0, 0
        self._drafted: list[int] = []

    def run(self, num_requests: int, steps: int) -> list[list[int]]:
        """Return the lengths of these steps."""
        self._drafted = (self._drafted + [0] * num_requests)[:num_requests]
        for _ in range(steps):
            self._step(num_requests)
        return self.history[-steps:]

    def _step(self, num_requests: int) -> None:
        seconds = self.seconds(num_requests, sum(self._drafted))
        verdicts = []
        for row, length in enumerate(self._drafted):
            accepted = 0
            while accepted < length and self.accepts(row, accepted):
                accepted += 1
            self.tokens += 1 + accepted
            if length:
                verdicts.append((row, length, accepted))
        self.rule.stepped(num_requests, verdicts, seconds * self.noise())
        nothing = [0] * num_requests
        lengths = nothing if self.rule.rests() else self.rule.lengths(list(range(num_requests)))
        if any(lengths):
            catching_up = self.catching_up if not any(self._drafted) else 0.0
            drafting = self.drafting * max(lengths)
            wanted = [length for length in lengths if length]
            self.rule.proposed(wanted, drafting * self.noise(), catching_up * self.noise())
            seconds += drafting + catching_up
        self.time += seconds
        self._drafted = lengths
        self.history.append(lengths)

    def speed_up(self, num_requests: int) -> float:
        """Tokens per second over those of plain steps."""
        return self.tokens / self.time * self.seconds(num_requests, 0) / num_requests


def by_chance(rates: list[float]) -> Callable[[int, int], bool]:
    """Tokens of each row are accepted with its rate."""
    rng = np.random.default_rng(0)
    return lambda row, place: rng.random() < rates[row]


def play(
    seconds: Callable[[int], float], *, drafting: float, rates: list[float], steps: int = 600
) -> tuple[list[list[int]], float]:
    """Serve requests with these acceptance rates where a step of n tokens takes `seconds(n)`.

    Returns the lengths step by step, and the speed over that of plain steps.
    """
    machine = Machine(AdaptiveLength(64), lambda n, k: seconds(n + k), by_chance(rates), drafting=drafting)
    return machine.run(len(rates), steps), machine.speed_up(len(rates))


def mean_length(history: list[list[int]]) -> float:
    return float(np.mean(history[len(history) // 2 :]))


def test_a_first_token_that_does_not_pay_alone_may_pay_with_those_behind_it() -> None:
    """One drafted token adds a step's time, each further one a tenth of it."""
    machine = Machine(
        AdaptiveLength(64), lambda n, k: n + (0.9 + 0.1 * k if k else 0.0), by_chance([0.85]), drafting=0.01
    )
    assert mean_length(machine.run(1, 600)) > 5
    assert machine.speed_up(1) > 1.5


def test_where_rows_are_free_and_drafts_are_right_proposals_are_long() -> None:
    history, speed_up = play(lambda n: 1.0 + 0.01 * n, drafting=0.02, rates=[0.95])
    assert mean_length(history) > 0.8 * ADAPTIVE_MOST
    assert speed_up > 3


def test_where_each_row_costs_its_share_nothing_is_proposed_and_little_is_lost() -> None:
    """A busy server: a step takes as long as it has tokens."""
    history, speed_up = play(float, drafting=0.1, rates=[0.7] * 32)
    assert mean_length(history) < 0.1
    assert speed_up > 0.97


def test_where_drafts_are_wrong_nothing_is_proposed_and_little_is_lost() -> None:
    history, speed_up = play(lambda n: 1.0 + 0.05 * n, drafting=0.1, rates=[0.05], steps=2000)
    assert mean_length(history) < 0.2
    assert speed_up > 0.97


def test_drafting_may_pay_for_one_request_and_not_for_another() -> None:
    history, speed_up = play(lambda n: 1.0 + 0.2 * n, drafting=0.0, rates=[0.95, 0.05])
    late = np.mean(history[300:], axis=0)
    assert late[0] > 3 * late[1] + 1
    assert speed_up > 1.2


def test_drafting_begins_when_it_pays_and_ends_when_it_does_not() -> None:
    right = True
    machine = Machine(
        AdaptiveLength(1), lambda n, k: 1.0 + 0.05 * k, lambda row, place: right, drafting=0.02, catching_up=0.2
    )
    assert np.mean(machine.run(1, 500)[-100:]) > 4
    right = False
    assert np.mean(machine.run(1, 3000)[-1000:]) < 0.1
    right = True
    assert np.mean(machine.run(1, 1500)[-200:]) > 4


def test_drafting_begins_when_its_costs_have_come_down() -> None:
    """Drafting is tried again after rows were too expensive for a while."""
    expensive = True
    machine = Machine(
        AdaptiveLength(1), lambda n, k: 1.0 + 5.0 * bool(k and expensive), by_chance([0.9]), drafting=0.02
    )
    assert mean_length(machine.run(1, 300)) < 0.1
    expensive = False
    assert np.mean(machine.run(1, 10_000)[-200:]) > 4


def test_long_proposals_that_were_dear_are_tried_again() -> None:
    expensive = True
    machine = Machine(
        AdaptiveLength(1, most=16),
        lambda n, k: 1.0 + 0.02 * k + 5.0 * (expensive and k > 4),
        lambda row, place: True,
        drafting=0.001,
    )
    machine.run(1, 200)
    expensive = False
    assert np.mean(machine.run(1, 1000)[-500:]) > 0.8 * 16


def test_where_the_first_token_is_hard_and_further_ones_are_sure_proposals_are_long() -> None:
    """As where a text is looked up: a first token that is right says that the place is the right one."""
    rng = np.random.default_rng(0)
    machine = Machine(
        AdaptiveLength(1, most=16),
        lambda n, k: 1.0 + 0.08 * k,
        lambda row, place: place > 0 or rng.random() < 0.6,
        drafting=0.001,
    )
    # With one rate for all tokens, 16 accepted ones in a row would be next to impossible.
    assert np.mean(machine.run(1, 1000)[-500:]) > 12


def test_the_adaptive_length_is_close_to_the_best_fixed_one() -> None:
    def seconds(n: int) -> float:
        return 1.0 + 0.12 * n

    def fixed(k: int) -> float:
        expected = (1 - 0.75 ** (k + 1)) / 0.25
        return expected / (seconds(2 * (k + 1)) + 0.08 * k) * seconds(2)

    _, adaptive = play(seconds, drafting=0.08, rates=[0.75] * 2, steps=3000)
    assert adaptive > 0.95 * max(fixed(k) for k in range(ADAPTIVE_MOST + 1))


def test_bad_luck_of_one_request_is_no_reason_to_give_up() -> None:
    """The bundled pair at temperature 0.8: a gain of a third at best, of which single steps tell little."""
    costs = {1: 1.0, 2: 1.22, 3: 1.38, 4: 1.46, 5: 1.65, 6: 1.76, 7: 1.86, 8: 1.96, 9: 2.05}
    history, speed_up = play(costs.__getitem__, drafting=0.077, rates=[0.65], steps=4000)
    best = max(sum(0.65**i for i in range(k + 1)) / (costs[k + 1] + 0.077 * k) for k in range(ADAPTIVE_MOST + 1))
    assert best > 1.3
    assert speed_up > 0.93 * best
    assert np.mean([length == 0 for (length,) in history]) < 0.25


def test_noise_is_no_reason_to_give_up() -> None:
    """The bundled pair, eight requests, on a machine with others: some steps take several times as long as they would.

    Two drafted tokens gain 1.3 times, and to begin again takes two steps' time, for a draft model has to catch up.
    """
    for seed in range(8):
        rng = np.random.default_rng(seed)

        def seconds(num_requests: int, num_drafted: int, rng: np.random.Generator = rng) -> float:
            noise = rng.lognormal(0, 0.1) * (rng.uniform(1.5, 6) if rng.random() < 0.04 else 1)
            return float((1 + 0.31 * num_drafted / num_requests) * noise)

        machine = Machine(AdaptiveLength(8), seconds, by_chance([0.8] * 8), drafting=0.07, catching_up=2.0)
        assert mean_length(machine.run(8, 600)) > 1, f"seed {seed}"


def test_what_all_requests_need_before_each_proposal_is_a_cost_of_it() -> None:
    """Without it, a drafted token would gain 1.2 times: as where short texts are soon followed by others."""
    rule, lengths, num_drafting = AdaptiveLength(8, most=2), [0] * 8, 0
    for _ in range(2000):
        verdicts = [(row, length, 1) for row, length in enumerate(lengths) if length]
        num_drafting += len(verdicts) == 8
        rule.stepped(8, verdicts, 1.0 + 0.07 * sum(lengths))
        lengths = [0] * 8 if rule.rests() else rule.lengths(list(range(8)))
        if wanted := [length for length in lengths if length]:
            rule.proposed(wanted, 0.1, len(wanted) / 8)
    assert 0 < num_drafting < 200


def test_steps_of_as_many_tokens_of_other_requests_do_not_mislead() -> None:
    """A row of another request is cheap here, a further row of the same one is expensive."""
    machine = Machine(AdaptiveLength(64), lambda n, k: 1.0 + 0.01 * n + 0.2 * k, lambda row, place: True, drafting=0.0)
    tokens = time = 0.0
    for _ in range(200):
        for num_requests in (12, 16, 20, 24):
            machine.run(num_requests, 4)
        before = machine.tokens, machine.time
        machine.run(8, 20)
        tokens, time = tokens + machine.tokens - before[0], time + machine.time - before[1]
    assert tokens / time / 8 * 1.08 > 0.97


def test_what_trials_cost_is_made_up_for_before_the_next() -> None:
    """Even where catching up is expensive, little time is lost, and trials go on."""
    machine = Machine(
        AdaptiveLength(64), lambda n, k: 1.0 + 0.05 * k, lambda row, place: False, drafting=0.05, catching_up=5.0
    )
    history = machine.run(16, 20_000)
    assert sum(map(any, history)) > 10
    assert machine.time < 1.02 * 20_000


@pytest.mark.parametrize("num_requests", [1, 16, 64])
def test_a_debt_is_that_of_its_load(num_requests: int) -> None:
    """While nothing is drafted for many requests, one that comes alone is tried at once, and the other way round."""
    machine = Machine(
        AdaptiveLength(64), lambda n, k: 1.0 + 0.05 * k, lambda row, place: False, drafting=0.05, catching_up=5.0
    )
    machine.run(num_requests, 100)
    assert machine.rule.rests()
    assert any(map(any, machine.run(4, 3)))


def test_a_trial_drafts_for_all_requests() -> None:
    """So that it shows what rows cost: two drafted ones among 32 would be lost in the noise."""
    rule, rows = AdaptiveLength(64), list(range(32))
    assert rule.lengths(rows) == [0] * 32, "a plain step comes first"
    rule.stepped(32, [], 1.0)
    for _ in range(3):
        assert rule.lengths(rows) == [2] * 32, "nothing was found: no trial yet"
        rule.proposed([], 0.1, 0.0)
        rule.stepped(32, [], 1.0)
    assert rule.lengths(rows) == [2] * 32
    rule.proposed([2] * 32, 0.1, 0.5)
    rule.stepped(32, [(row, 2, 0) for row in rows], 3.0)
    assert rule.lengths(rows) == [0] * 32
    for _ in range(150):
        rule.stepped(32, [], 1.0)
        assert rule.rests(), "1% of the time does not make up for it yet"


# The bundled pair on two cores, by number of requests: plain steps in a second, and what a step that verifies 2, 4 or
# 8 tokens for each takes, relative to a plain one.
MEASURED = {
    1: (1900, (1.80, 2.72, 3.87)),
    4: (800, (1.75, 2.58, 4.33)),
    8: (520, (1.80, 2.72, 4.60)),
    32: (190, (2.37, 4.03, 6.72)),
}


@pytest.mark.parametrize("rate", [0.0, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("num_requests", MEASURED)
def test_within_a_second_the_gain_is_that_of_the_best_fixed_length_or_next_to_nothing_is_lost(
    num_requests: int, rate: float
) -> None:
    """In a world whose costs were measured, with noise, slow steps and a draft model that has prompts to read."""
    steps, measured = MEASURED[num_requests]
    costs = [float(np.interp(k, (0, 2, 4, 8), (1, *measured))) for k in range(ADAPTIVE_MOST + 1)]
    best = max(sum(rate**i for i in range(k + 1)) / (cost + 0.07 * k) for k, cost in enumerate(costs))
    speed_ups = []
    for seed in range(4):
        rng = np.random.default_rng(seed)

        def noise(rng: np.random.Generator = rng) -> float:
            return float(rng.lognormal(0, 0.06) * (rng.uniform(1.5, 6) if rng.random() < 0.02 else 1))

        def accepts(row: int, place: int, rng: np.random.Generator = rng) -> bool:
            return rng.random() < rate

        machine = Machine(
            AdaptiveLength(num_requests),
            lambda n, k: float(np.interp(k / n, range(ADAPTIVE_MOST + 1), costs)),
            accepts,
            drafting=0.07,
            catching_up=0.5,
            noise=noise,
        )
        machine.run(num_requests, steps)
        speed_ups.append(machine.speed_up(num_requests))
    assert np.mean(speed_ups) > 0.95 * best
    assert np.mean(speed_ups) > 0.97


def test_while_drafting_pays_plain_steps_show_what_they_cost_by_now() -> None:
    """The machine becomes faster, but not for steps with drafted tokens: drafting does not pay any more."""
    plain = 1.0
    machine = Machine(
        AdaptiveLength(1), lambda n, k: plain if k == 0 else 1.0 + 0.1 * k, by_chance([0.5]), drafting=0.0
    )
    assert mean_length(machine.run(1, 500)) > 1
    plain = 0.5
    assert np.mean(machine.run(1, 6000)[-1000:]) < 0.2


def test_steps_with_prompts_teach_acceptance_and_no_costs() -> None:
    rule = AdaptiveLength(1)
    rule.stepped(1, [], 1.0)
    for _ in range(50):
        rule.stepped(1, [(0, 2, 2)], None)
    assert rule.lengths([0]) == [ADAPTIVE_MOST]


def test_another_request_in_a_row_is_not_judged_by_the_one_before() -> None:
    rule = AdaptiveLength(2)
    rule.stepped(2, [], 1.0)
    for _ in range(100):
        rule.stepped(2, [(0, 2, 2), (1, 1, 0)], 1.2)
    assert rule.lengths([0, 1])[1] == 0
    rule.join(1)
    assert rule.lengths([0, 1])[1] > 0
