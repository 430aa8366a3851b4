"""How many tokens to propose for whom."""

from __future__ import annotations

from typing import Protocol

from model.speculation.costs import LEAST_SHARE_OF_NEWEST, ProposalCosts, StepCosts

MOST_SPEC_TOKENS = 16  # of any proposal
ADAPTIVE_MOST = 8
_SIZES_BETWEEN = 4  # that are looked at for each depth
# A gain has to be worth the trouble of looking for it.
_LEAST_GAIN = 1.05
# How many steps a decision holds, for as long as the same requests ask.
_HOLDS, _RESTS = 4, 32
_ABOUT_AS_MANY = 0.25  # so much more or less requests are no reason to look sooner
# Acceptance is counted with a fading memory; what is forgotten gives way to what other requests have, and that to hope.
_FADES, _FADES_OVERALL = 0.95, 0.99
_FADES_AT_REST = 0.9
_TRUST_FADES_AT_REST = 0.98
_ENOUGH_TO_KNOW = 8.0  # drafted tokens
_TRIED_AT_ONCE = 8  # of so many requests, one, while there is not
_WEIGHT_OF_OTHERS = 6.0
_HOPE, _WEIGHT_OF_HOPE = 0.7, 1.0


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

    def proposed(self, lengths: list[int], seconds: float) -> None:
        pass


class AdaptiveLength:
    """Implements `LengthRule` by goodput: tokens that are expected to be accepted, over the time that they take.

    After Liu et al. 2024 (SmartSpec) and 2025 (TurboSpec).  If the tokens drafted for a request are each accepted with
    probability a, the j-th of them gives a^j tokens.  The costs of steps and proposals are those measured so far.
    Where nothing is gained it proposes nothing, and looks again only after a rest, with less and less certain memories
    of what was accepted and what it cost: so a proposal is tried now and then, unless it could not pay on any account.

    Args:
        max_num_seqs: rows.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._target = StepCosts()
        self._draft = ProposalCosts()
        self._accepted, self._rejected = [0.0] * max_num_seqs, [0.0] * max_num_seqs
        self._overall = [0.0, 0.0]  # accepted, rejected
        self._trust = 1.0  # in what tokens were found to cost
        self._asked: list[int] = []
        self._num_requests = 0
        self._answer: list[int] = []
        self._holds = 0

    def join(self, row: int) -> None:
        self._accepted[row] = self._rejected[row] = 0.0

    def verified(self, row: int, num_drafted: int, num_accepted: int) -> None:
        self._trust = 1.0
        was_rejected = float(num_accepted < num_drafted)
        self._accepted[row] = _FADES * self._accepted[row] + num_accepted
        self._rejected[row] = _FADES * self._rejected[row] + was_rejected
        self._overall[0] = _FADES_OVERALL * self._overall[0] + num_accepted
        self._overall[1] = _FADES_OVERALL * self._overall[1] + was_rejected

    def took(self, num_tokens: int, seconds: float) -> None:
        self._target.observe(num_tokens, seconds, self._share_of_newest())

    def proposed(self, lengths: list[int], seconds: float) -> None:
        self._draft.observe(len(lengths), max(lengths), seconds, self._share_of_newest())

    def _share_of_newest(self) -> float:
        """What a new cost counts: the more, the less the old ones are trusted."""
        return max(LEAST_SHARE_OF_NEWEST, 1 - self._trust if any(self._answer) else 0.0)

    def rests(self, num_requests: int) -> bool:
        is_at_rest = self._holds > 0 and not any(self._answer)
        if not is_at_rest or abs(num_requests - self._num_requests) > _ABOUT_AS_MANY * self._num_requests:
            return False
        self._holds -= 1
        return True

    def lengths(self, rows: list[int], num_others: int) -> list[int]:
        base = self._target.predict(num_others + len(rows))
        if base is None:
            return [0] * len(rows)  # until the step that tells
        self._holds -= 1
        if self._holds >= 0 and rows == self._asked:
            return self._answer
        if self._holds < 0 and not any(self._answer):
            self._forget()  # a rest is over
        self._asked, self._num_requests = rows, len(rows) + num_others
        self._answer = self._decide(rows, num_others, base)
        if any(self._answer):
            self._holds = _HOLDS
        elif self._holds < 0:
            self._holds = _RESTS
        return self._answer

    def _decide(self, rows: list[int], num_others: int, base: float) -> list[int]:
        """The proposals with the greatest goodput: the tokens with the best chances, as many as are worth it.

        While little is known of what is accepted, only a few requests are tried.
        """
        count = len(rows)
        is_known = sum(self._overall) >= _ENOUGH_TO_KNOW
        rates = [self._rate(row) for row in (rows if is_known else rows[: max(1, count // _TRIED_AT_ONCE)])]
        chances = sorted(
            ((rate**depth, -depth, i) for i, rate in enumerate(rates) for depth in range(1, ADAPTIVE_MOST + 1)),
            reverse=True,
        )
        num_drafted = self._num_worthwhile(chances, count, num_others, base)
        lengths = [0] * count
        for _, _, i in chances[:num_drafted]:
            lengths[i] += 1
        return lengths

    def _num_worthwhile(self, chances: list[tuple[float, int, int]], count: int, num_others: int, base: float) -> int:
        """How many of the tokens to draft, which are given with their chances, best first, for the greatest goodput."""
        best, num_best = _LEAST_GAIN * count / base, 0
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
        return num_best

    def _rate(self, row: int) -> float:
        """The chance of a drafted token to be accepted."""
        overall = (self._overall[0] + _WEIGHT_OF_HOPE * _HOPE) / (sum(self._overall) + _WEIGHT_OF_HOPE)
        own = self._accepted[row] + self._rejected[row]
        return (self._accepted[row] + _WEIGHT_OF_OTHERS * overall) / (own + _WEIGHT_OF_OTHERS)

    def _forget(self) -> None:
        self._trust *= _TRUST_FADES_AT_REST
        self._overall = [_FADES_AT_REST * count for count in self._overall]
        for row in self._asked:
            self._accepted[row] *= _FADES_AT_REST
            self._rejected[row] *= _FADES_AT_REST
