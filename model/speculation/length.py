"""How many tokens to propose for whom."""

from __future__ import annotations

import math
from typing import Protocol

from shoal.model.speculation.acceptance import Acceptance
from shoal.model.speculation.costs import LEAST_SHARE_OF_NEWEST, ProposalCosts, StepCosts
from shoal.model.speculation.yields import Yields

MOST_SPEC_TOKENS = 16  # of any proposal
ADAPTIVE_MOST = 8  # unless a guess costs next to nothing
_SIZES_BETWEEN = 4  # that are looked at for each depth
# A gain has to be worth the trouble of looking for it; once there it may be small for a while.
_LEAST_GAIN, _LEAST_TO_STAY = 1.05, 1.0
# What is expected to come close to it is tried in earnest: a few steps with guesses, among plain ones, cost more than
# those that follow each other, when the caches of the CPU hold what they need.
_NEAR_GAIN = 0.85
# How many steps a decision holds, for as long as the same requests ask, and how many a trial takes: one in earnest, one
# that only shows what is accepted.
_HOLDS, _TRIES_IN_EARNEST, _TRIES = 4, 12, 2
_IN_EARNEST_EACH = 4  # trials, for all requests may have to be caught up with
# Where nothing is to be gained there is a rest between two trials, longer each time that one shows nothing new.
_FIRST_REST, _SHORTEST_REST, _LONGEST_REST = 4, 16, 512
# After so many decisions to propose a few plain steps show what those cost by now; and half way between, proposals of
# twice the length, for what they cost may have been learnt in a bad moment.
_LOOKS_BACK = 32
_ABOUT_AS_MANY = 0.25  # so much more or less requests are no reason to look sooner
_MOSTLY_OTHERS = 0.5  # but so many new ones among them are
# Of the time of plain steps, what may be lost with guesses that gain nothing: no rest ends before it is made up for.
# Gains make up for it too, and beforehand for as many plain steps of one request; to begin with there is as much to
# spend.
_MAY_BE_LOST = 0.015
_MOST_CREDIT = 32
_TRIED_TOKENS = 2
_UNKNOWN_RATE = 0.5
_GOOD_RATES = 0.9, 0.9  # of acceptance, by which a trial that could not show a gain is spared
_ENOUGH_TO_KNOW = 8.0  # drafted tokens
_TRUST_FADES_AT_REST = 0.95


Rates = tuple[float, float]  # the chance of a first drafted token, and of a further one if those before it are right


class LengthRule(Protocol):
    """Says how long proposals should be, and is told what came of them."""

    def join(self, row: int) -> None:
        """Another request has the row now."""
        ...

    def rests(self, num_requests: int) -> bool:
        """Whether nothing is to be proposed after a step of so many requests, whosoever they are; else `lengths`
        says."""
        ...

    def lengths(self, rows: list[int], num_others: int) -> list[int]:
        """Most tokens to propose for the request in each of `rows`; 0 for none.

        Args:
            num_others: tokens that the next step will compute for other requests, as far as one can tell.
        """
        ...

    def verified(self, row: int, num_drafted: int, num_accepted: int) -> None:
        """A proposal was verified."""
        ...

    def took(self, num_tokens: int, seconds: float) -> None:
        """The target's step of so many tokens took so long."""
        ...

    def caught_up(self, seconds: float) -> None:
        """What guessing needs once, before it can begin, took so long."""
        ...

    def proposed(self, lengths: list[int], seconds: float) -> None:
        """Proposing so many tokens each took so long."""
        ...


class FixedLength:
    """Implements `LengthRule` with one number for all.

    Args:
        num_spec_tokens: that number.
    """

    def __init__(self, num_spec_tokens: int) -> None:
        self._num_spec_tokens = num_spec_tokens

    def join(self, row: int) -> None:
        pass

    def rests(self, num_requests: int) -> bool:
        return False

    def lengths(self, rows: list[int], num_others: int) -> list[int]:
        return [self._num_spec_tokens] * len(rows)

    def verified(self, row: int, num_drafted: int, num_accepted: int) -> None:
        pass

    def took(self, num_tokens: int, seconds: float) -> None:
        pass

    def caught_up(self, seconds: float) -> None:
        pass

    def proposed(self, lengths: list[int], seconds: float) -> None:
        pass


class AdaptiveLength:
    """Implements `LengthRule` by goodput: tokens that are expected to be accepted, over the time that they take.

    After Liu et al. 2024 (SmartSpec) and 2025 (TurboSpec).  If the first token drafted for a request is accepted with
    probability a, and each further one with b if those before it are, the j-th of them gives a b^(j-1) tokens; where
    the first is right, others often are, above all if they were looked up.  The costs of steps and proposals are those
    measured so far.
    Where nothing is gained it proposes nothing, but tries one request after a rest: texts change, and so does what else
    the machine does, so that old costs are trusted less with each rest.  And what was expected is compared with what
    came, for costs that are taken one by one, in other moments, do not add up to those of a step with everything in it.

    Args:
        max_num_seqs: rows.
        most: tokens for any request.
    """

    def __init__(self, max_num_seqs: int, most: int = ADAPTIVE_MOST) -> None:
        self._most = most
        self._target = StepCosts()
        self._draft = ProposalCosts()
        self._yields = Yields()
        self._first, self._further = Acceptance(max_num_seqs), Acceptance(max_num_seqs)  # tokens of proposals
        self._trust = 1.0  # in what tokens were found to cost
        self._asked: list[int] = []
        self._num_requests = 0
        self._num_joined = 0  # since the last look
        self._lost = -math.inf  # seconds, with guesses, that are not made up for; a credit if negative
        self._answer: list[int] = []
        self._holds = 0
        self._rest = _FIRST_REST
        self._num_decisions = 0  # to propose something
        self._num_trials = 0  # since then, in which something was known

    def join(self, row: int) -> None:
        self._first.join(row)
        self._further.join(row)
        self._num_joined += 1

    def verified(self, row: int, num_drafted: int, num_accepted: int) -> None:
        self._trust = 1.0
        self._yields.verified(num_drafted, num_accepted)
        self._first.count(row, min(num_accepted, 1), int(num_accepted == 0))
        self._further.count(row, max(num_accepted - 1, 0), int(0 < num_accepted < num_drafted))

    def took(self, num_tokens: int, seconds: float) -> None:
        self._target.observe(num_tokens, seconds, self._share_of_newest())
        self._yields.took(num_tokens, seconds)
        if not any(self._answer) and self._lost > 0:
            self._lost -= _MAY_BE_LOST * seconds

    def caught_up(self, seconds: float) -> None:
        self._lost += seconds

    def proposed(self, lengths: list[int], seconds: float) -> None:
        self._yields.proposed(seconds)
        self._draft.observe(len(lengths), max(lengths), seconds, self._share_of_newest())

    def _share_of_newest(self) -> float:
        """What a new cost counts: the more, the less the old ones are trusted."""
        return max(LEAST_SHARE_OF_NEWEST, 1 - self._trust if any(self._answer) else 0.0)

    def rests(self, num_requests: int) -> bool:
        if any(self._answer):
            return False
        is_as_before = abs(num_requests - self._num_requests) <= _ABOUT_AS_MANY * self._num_requests
        is_as_before &= self._num_joined < _MOSTLY_OTHERS * self._num_requests
        if self._lost > 0 or (self._holds > 0 and is_as_before):
            self._holds -= 1
            return True
        return False

    def lengths(self, rows: list[int], num_others: int) -> list[int]:
        self._lost += self._yields.settle(self._target)
        base = self._target.predict(num_others + len(rows))
        if base is None:
            return [0] * len(rows)  # until the step that tells
        self._lost = max(self._lost, -_MOST_CREDIT * base / (num_others + len(rows)))
        self._holds -= 1
        if self._holds >= 0 and rows == self._asked:
            return self._answer
        has_rested = self._holds < 0 and not any(self._answer)
        self._asked, self._num_requests, self._num_joined = rows, len(rows) + num_others, 0
        self._answer = self._decide(rows, num_others, base)
        if any(self._answer):
            self._holds, self._rest = _HOLDS, _SHORTEST_REST
            self._num_decisions, self._num_trials = self._num_decisions + 1, 0
            if self._num_decisions % _LOOKS_BACK == 0:
                self._answer, self._holds = [0] * len(rows), _TRIES
            elif self._num_decisions % _LOOKS_BACK == _LOOKS_BACK // 2:
                self._answer, self._holds = [min(2 * length, self._most) for length in self._answer], _TRIES
                self._yields.expect(None)
        elif has_rested:
            self._try(num_others, base)
        elif self._holds < 0:
            self._holds = self._rest
        return self._answer

    def _decide(self, rows: list[int], num_others: int, base: float) -> list[int]:
        """The proposals with the greatest goodput: the tokens with the best chances, as many as are worth it."""
        if not self._is_known:
            return [0] * len(rows)
        least_gain = _LEAST_TO_STAY if any(self._answer) else _LEAST_GAIN
        return self._best(self._rates(rows), num_others, base, least_gain)

    @property
    def _is_known(self) -> bool:
        return self._first.num_seen + self._further.num_seen >= _ENOUGH_TO_KNOW

    def _try(self, num_others: int, base: float) -> None:
        """Propose what comes close to a gain, or a few tokens for one request if those could show one at all.

        One is always the first, which a draft that must read what it guesses behind has read the most of.
        """
        self._trust *= _TRUST_FADES_AT_REST
        self._yields.fade()
        for row in self._asked:
            self._first.fade(row)
            self._further.fade(row)
        if self._is_known:
            self._rest = min(max(2 * self._rest, _SHORTEST_REST), _LONGEST_REST)
            if self._num_trials % _IN_EARNEST_EACH == 0:
                self._answer = self._best(self._rates(self._asked), num_others, base, _NEAR_GAIN)
            self._num_trials += 1
        if any(self._answer):
            self._holds = _TRIES_IN_EARNEST
        elif any(self._best([_GOOD_RATES] * len(self._asked), num_others, base, _LEAST_GAIN)):
            self._answer[0], self._holds = _TRIED_TOKENS, _TRIES
            self._yields.expect(None)
        else:
            self._holds = self._rest

    def _best(self, rates: list[Rates], num_others: int, base: float, least_gain: float) -> list[int]:
        depths = range(1, self._most + 1)
        chances = sorted(
            (
                (first * further ** (depth - 1), -depth, i)
                for i, (first, further) in enumerate(rates)
                for depth in depths
            ),
            reverse=True,
        )
        lengths = [0] * len(rates)
        for _, _, i in chances[: self._num_worthwhile(chances, len(rates), num_others, base, least_gain)]:
            lengths[i] += 1
        return lengths

    def _num_worthwhile(
        self, chances: list[tuple[float, int, int]], count: int, num_others: int, base: float, least_gain: float
    ) -> int:
        """How many of the tokens to draft, which are given with their chances, best first, for the greatest goodput."""
        plain = count / base
        best, num_best = least_gain * plain / self._yields.share(count + num_others), 0
        expected, depth = float(count), 0
        asked: set[int] = set()
        stride = max(1, count // _SIZES_BETWEEN)
        for num_tokens, (chance, negative_depth, i) in enumerate(chances, start=1):
            expected += chance
            depth = max(depth, -negative_depth)
            asked.add(i)
            if num_tokens % stride:
                continue
            step = self._target.predict(num_others + count + num_tokens)
            draft = self._draft.predict(len(asked), depth)
            if step is None or draft is None:
                break  # smaller ones have to show first what it may take
            goodput = expected / (base + self._trust * (max(step - base, 0.0) + draft))
            if goodput > best:
                best, num_best = goodput, num_tokens
        self._yields.expect(best / plain if num_best else None)
        return num_best

    def _rates(self, rows: list[int]) -> list[Rates]:
        """As long as little is known of further tokens, they are taken for as good as the first."""
        first = [self._first.rate(row, _UNKNOWN_RATE) for row in rows]
        return [(rate, self._further.rate(row, rate)) for row, rate in zip(rows, first, strict=True)]
