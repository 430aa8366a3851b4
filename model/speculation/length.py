"""How many tokens to propose for which request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from shoal.model.speculation.config import ADAPTIVE_MOST
from shoal.model.speculation.estimates import Acceptance, Costs, load_class

# Trials may lose this share of the time of plain steps.
_SHARE_FOR_TRIALS = 0.01
# Gains are kept for later trials until they are worth the time of this many tokens.
_MOST_CREDIT = 32
# While such gains last, drafting need only reach this share of a plain step's goodput, for an estimate may be too low.
_NEAR = 0.9
# While drafting pays, one decision in this many is another one, which shows what that costs by now.
_LOOK_EVERY = 32
# A trial drafts this many tokens, for one request.
_TRIED_TOKENS = 2


class LengthRule:
    """Says how long proposals should be.  The methods without a result tell it what came of them."""

    def join(self, row: int) -> None:
        """Another request has the row now."""

    def stepped(self, num_requests: int, verdicts: Sequence[tuple[int, int, int]], seconds: float | None) -> None:
        """A step was computed.

        Args:
            num_requests: number of requests in the step.
            verdicts: row, number of drafted tokens and number of accepted ones, for each proposal in the step.
            seconds: how long the step took; None if it computed prompts, too.
        """

    def rests(self) -> bool:
        """Return whether nothing is to be proposed after this step for any request; else `lengths` decides."""
        return False

    def lengths(self, rows: list[int]) -> list[int]:
        """Return the most tokens to propose for the request in each of `rows`; 0 for none."""
        raise NotImplementedError

    def proposed(self, lengths: list[int], drafting: float, catching_up: float) -> None:
        """Tokens were drafted.

        Args:
            lengths: what was wanted for each request that now has a proposal.
            drafting: seconds.
            catching_up: seconds before, for what drafting needs once and not in every step.
        """


class FixedLength(LengthRule):
    """Proposes `num_spec_tokens` for every request."""

    def __init__(self, num_spec_tokens: int) -> None:
        self._num_spec_tokens = num_spec_tokens

    def lengths(self, rows: list[int]) -> list[int]:
        return [self._num_spec_tokens] * len(rows)


class AdaptiveLength(LengthRule):
    """Proposes what has the greatest goodput: tokens that are expected to be accepted, over the time that they take.

    After Liu et al. 2024 (SmartSpec) and 2025 (TurboSpec).  If the first token drafted for a request is accepted with
    probability a, and each further one with b if those before it are, the j-th of them adds a b^(j-1) tokens.

    Where drafting does not pay, it is tried for one request now and then, for texts change, and so do costs.  A small
    share of the time pays for that: what trials lose, catching up included, is a debt of the class of loads.  While
    drafting does not pay, nothing is tried or begun before plain steps have paid the debt off.  While it pays, catching
    up is a cost of it, and what it loses is no debt: where it stops, what plain steps cost by now may say otherwise.

    Args:
        max_num_seqs: number of rows of the batch.
        most: longest proposal.
    """

    def __init__(self, max_num_seqs: int, most: int = ADAPTIVE_MOST) -> None:
        self._most = most
        self._acceptance = [Acceptance() for _ in range(max_num_seqs)]
        self._acceptance_of_all = Acceptance()
        self._costs = Costs()
        self._credit: defaultdict[int, float] = defaultdict(float)  # seconds, by class of loads; a debt if negative
        self._num_requests = 1  # in the last step
        self._pays = False  # whether drafting did by the last decision
        self._num_decisions = 0  # that it pays

    def join(self, row: int) -> None:
        self._acceptance[row] = Acceptance()

    def stepped(self, num_requests: int, verdicts: Sequence[tuple[int, int, int]], seconds: float | None) -> None:
        self._num_requests = num_requests
        num_drafted = num_accepted = 0
        for row, drafted, accepted in verdicts:
            self._acceptance[row].count(drafted, accepted)
            self._acceptance_of_all.count(drafted, accepted)
            num_drafted, num_accepted = num_drafted + drafted, num_accepted + accepted
        if seconds is not None:
            self._costs.step(num_requests, len(verdicts), num_drafted, seconds)
        if self._costs.knows(num_requests):
            load, plain = load_class(num_requests), self._costs.plain(num_requests)
            if num_drafted:
                fixed, each = self._costs.verification(num_requests)
                gain = num_accepted * plain / num_requests - len(verdicts) * fixed - num_drafted * each
                credit = min(self._credit[load] + gain, _MOST_CREDIT * plain / num_requests)
                self._credit[load] = max(credit, 0.0) if self._pays else credit
            elif self._credit[load] < 0:
                self._credit[load] += _SHARE_FOR_TRIALS * plain

    def rests(self) -> bool:
        return not self._pays and self._credit[load_class(self._num_requests)] < 0

    def lengths(self, rows: list[int]) -> list[int]:
        nothing = [0] * len(rows)
        if not self._costs.knows(self._num_requests):
            return nothing  # the next step shows what a plain one costs
        best = nothing if self.rests() else self._best(rows)
        self._pays = any(best)
        if self._pays:
            self._num_decisions += 1
            num_looks, is_usual = divmod(self._num_decisions, _LOOK_EVERY)
            if not is_usual:
                return nothing if num_looks % 2 else [min(2 * length, self._most) for length in best]
            return best
        if not self.rests():
            nothing[0] = _TRIED_TOKENS  # for the first request: a draft model has read the most of its text
        return nothing

    def proposed(self, lengths: list[int], drafting: float, catching_up: float) -> None:
        self._credit[load_class(self._num_requests)] -= drafting if self._pays else drafting + catching_up
        if self._pays:
            self._costs.caught_up(self._num_requests, catching_up)
        if lengths:
            self._costs.proposal(self._num_requests, max(lengths), drafting)

    def _best(self, rows: list[int]) -> list[int]:
        """Return the lengths with the greatest goodput, all of them 0 if a plain step's is greater.

        They grow a token at a time, for the requests whose next token is worth the time of its row.
        """
        rates = [self._acceptance[row].rates(self._acceptance_of_all) for row in rows]
        chances = [first for first, _ in rates]  # of the next token of each request
        tokens, seconds = float(self._num_requests), self._costs.plain(self._num_requests)
        goodput, best = tokens / seconds, [0] * len(rows)
        seconds += self._costs.catching_up(self._num_requests)
        if self._credit[load_class(self._num_requests)] > 0:
            goodput *= _NEAR
        lengths, growing = best.copy(), list(range(len(rows)))
        fixed, each = self._costs.verification(self._num_requests)
        start, drafting = self._costs.drafting(self._num_requests)
        for length in range(1, self._most + 1):
            verification = each if length > 1 else fixed + each
            growing = [i for i in growing if chances[i] > goodput * verification]
            if not growing:
                break
            for i in growing:
                lengths[i] = length
                tokens += chances[i]
                chances[i] *= rates[i][1]
            seconds += len(growing) * verification + drafting + (start if length == 1 else 0.0)
            if tokens / seconds > goodput:
                goodput, best = tokens / seconds, lengths.copy()
        return best
