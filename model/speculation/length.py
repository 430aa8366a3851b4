"""How many tokens to propose for whom."""

from __future__ import annotations

from typing import Protocol

from model.speculation.costs import ProposalCosts, StepCosts

MOST_SPEC_TOKENS = 16  # of any proposal
ADAPTIVE_MOST = 8
# A gain has to be worth the trouble of looking for it.
_LEAST_GAIN = 1.03
# How many steps a decision holds, for as long as the same requests ask.
_HOLDS, _RESTS = 4, 32
# Acceptance is counted with a fading memory; what is forgotten gives way to what other requests have, and that to hope.
_FADES, _FADES_OVERALL = 0.9, 0.99
_FADES_AT_REST = 0.9
_WEIGHT_OF_OTHERS = 2.0
_HOPE, _WEIGHT_OF_HOPE = 0.7, 1.0


class LengthRule(Protocol):
    """Says how long proposals should be, and is told what came of them."""

    def join(self, row: int) -> None:
        """Another request has the row now."""
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

    After Liu et al. 2024 (SmartSpec) and 2025 (TurboSpec).  A proposal of k tokens of which each is accepted with
    probability a gives (1 - a^(k+1)) / (1 - a) tokens.  The costs of steps are those measured so far.  Where nothing
    is gained it proposes nothing, and looks again only after a rest, with less and less certain memories: so a
    proposal is tried now and then, unless it could not pay even if it were accepted.

    Args:
        max_num_seqs: rows.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._target = StepCosts()
        self._draft = ProposalCosts()
        self._accepted, self._rejected = [0.0] * max_num_seqs, [0.0] * max_num_seqs
        self._overall = [0.0, 0.0]  # accepted, rejected
        self._asked: list[int] = []
        self._answer: list[int] = []
        self._holds = 0

    def join(self, row: int) -> None:
        self._accepted[row] = self._rejected[row] = 0.0

    def verified(self, row: int, num_drafted: int, num_accepted: int) -> None:
        was_rejected = float(num_accepted < num_drafted)
        self._accepted[row] = _FADES * self._accepted[row] + num_accepted
        self._rejected[row] = _FADES * self._rejected[row] + was_rejected
        self._overall[0] = _FADES_OVERALL * self._overall[0] + num_accepted
        self._overall[1] = _FADES_OVERALL * self._overall[1] + was_rejected

    def took(self, num_tokens: int, seconds: float) -> None:
        self._target.observe(num_tokens, seconds)

    def proposed(self, lengths: list[int], seconds: float) -> None:
        self._draft.observe(len(lengths), max(lengths), seconds)

    def lengths(self, rows: list[int], num_others: int) -> list[int]:
        self._holds -= 1
        if self._holds < 0 or rows != self._asked:
            at_rest = not any(self._answer)
            if at_rest and self._holds >= 0 and len(rows) == len(self._asked):
                return [0] * len(rows)  # others, but as many: no reason to look sooner
            self._asked, self._holds = rows, _HOLDS
            self._answer = self._decide(rows, num_others)
        return self._answer

    def _decide(self, rows: list[int], num_others: int) -> list[int]:
        """The common length with the greatest goodput, shortened for requests whose last tokens are not worth it."""
        count = len(rows)
        base = self._target.predict(num_others + count)
        if base is None:
            self._holds = 0  # after the step that tells
            return [0] * count
        rates = [self._rate(row) for row in rows]
        best, length, gain = _LEAST_GAIN * count / base, 0, 0.0
        chances, expected = rates, float(count)
        for k in range(1, ADAPTIVE_MOST + 1):
            expected += sum(chances)
            chances = [chance * rate for chance, rate in zip(chances, rates, strict=True)]
            step, draft = self._target.predict(num_others + count * (1 + k)), self._draft.predict(count, k)
            if step is None or draft is None:
                break  # shorter ones have to show first what it may take
            seconds = step + draft
            if expected / seconds > best:
                best, length = expected / seconds, k
                gain = best * (seconds - base) / (count * k)  # tokens that the time of a drafted one is worth
        if not length:
            self._holds = _RESTS
            self._forget()
        return [_worthwhile(rate, gain, length) for rate in rates]

    def _rate(self, row: int) -> float:
        """The chance of a drafted token to be accepted."""
        overall = (self._overall[0] + _WEIGHT_OF_HOPE * _HOPE) / (sum(self._overall) + _WEIGHT_OF_HOPE)
        own = self._accepted[row] + self._rejected[row]
        return (self._accepted[row] + _WEIGHT_OF_OTHERS * overall) / (own + _WEIGHT_OF_OTHERS)

    def _forget(self) -> None:
        self._overall = [_FADES_AT_REST * count for count in self._overall]
        for row in self._asked:
            self._accepted[row] *= _FADES_AT_REST
            self._rejected[row] *= _FADES_AT_REST


def _worthwhile(rate: float, gain: float, length: int) -> int:
    """How many of `length` tokens have a chance to be accepted that is worth their time."""
    chance, count = rate, 0
    while count < length and chance >= gain:
        chance *= rate
        count += 1
    return count
