"""How many tokens to propose for which request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from shoal.model.speculation.config import ADAPTIVE_MOST
from shoal.model.speculation.estimates import Acceptance, Costs, load_class

# Trials may lose this share of the time of plain steps.
_SHARE_FOR_TRIALS = 0.01
# While drafting pays, each group of this many decisions begins with other ones, which show what those cost by now.
_LOOK_EVERY = 32
# A trial drafts this many tokens for each request.
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

    Where drafting does not pay, it is tried now and then, for texts change, and so do costs; for all requests, because
    few of many drafted rows would show nothing of their cost.  What a trial loses, catching up included, is a debt of
    the class of loads, which a small share of the time of plain steps pays off before the next trial.  While drafting
    pays, catching up is a cost of it, and what it loses is no debt: where it stops, it is soon tried again.

    Args:
        max_num_seqs: number of rows of the batch.
        most: longest proposal.
    """

    def __init__(self, max_num_seqs: int, most: int = ADAPTIVE_MOST) -> None:
        self._most = most
        self._acceptance = [Acceptance() for _ in range(max_num_seqs)]
        self._acceptance_of_all = Acceptance()
        self._costs = Costs()
        self._debt: defaultdict[int, float] = defaultdict(float)  # seconds, by class of loads
        self._num_requests = 1  # in the last step
        self._verified = False  # whether that step had drafted tokens
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
        was_plain, self._verified = not self._verified, num_drafted > 0
        if seconds is not None and (self._verified or was_plain or not self._costs.knows(num_requests)):
            self._costs.step(num_requests, len(verdicts), num_drafted, seconds)
        if not self._pays and self._costs.knows(num_requests):
            load, plain = load_class(num_requests), self._costs.plain(num_requests)
            lost = -_SHARE_FOR_TRIALS * plain
            if self._verified:
                fixed, each = self._costs.verification(num_requests)
                lost = len(verdicts) * fixed + num_drafted * each - num_accepted * plain / num_requests
            self._debt[load] = max(self._debt[load] + lost, 0.0)

    def rests(self) -> bool:
        return not (self._pays or self._verified or self._may_try())

    def lengths(self, rows: list[int]) -> list[int]:
        nothing = [0] * len(rows)
        if not self._costs.knows(self._num_requests):
            return nothing  # the next step shows what a plain one costs
        best = self._best(rows)
        self._pays = any(best)
        if not self._pays:
            return [_TRIED_TOKENS] * len(rows) if self._may_try() else nothing
        self._num_decisions += 1
        group, place = divmod(self._num_decisions, _LOOK_EVERY)
        if group % 2 and place < 2:
            return nothing  # twice, for the first plain step is dearer: the draft has taken the CPU's caches
        return best if place else [min(2 * length, self._most) for length in best]

    def proposed(self, lengths: list[int], drafting: float, catching_up: float) -> None:
        if self._pays:
            self._costs.caught_up(self._num_requests, catching_up)
        else:  # to have looked in vain is no trial yet
            self._debt[load_class(self._num_requests)] += catching_up + (drafting if lengths else 0.0)
        if lengths:
            self._costs.proposal(self._num_requests, max(lengths), drafting)

    def _may_try(self) -> bool:
        return not self._debt[load_class(self._num_requests)]

    def _best(self, rows: list[int]) -> list[int]:
        """Return the lengths with the greatest goodput, all of them 0 if a plain step's is greater.

        They grow a token at a time, for the requests whose next token is worth the time of its row.
        """
        rates = [self._acceptance[row].rates(self._acceptance_of_all) for row in rows]
        chances = [first for first, _ in rates]  # of the next token of each request
        tokens, seconds = float(self._num_requests), self._costs.plain(self._num_requests)
        goodput, best = tokens / seconds, [0] * len(rows)
        seconds += self._costs.catching_up(self._num_requests)
        lengths, growing = best.copy(), list(range(len(rows)))
        fixed, each = self._costs.verification(self._num_requests)
        start, drafting = self._costs.drafting(self._num_requests)
        for length in range(1, self._most + 1):
            growing = [i for i in growing if chances[i] > goodput * each]
            if not growing:
                break
            for i in growing:
                lengths[i] = length
                tokens += chances[i]
                chances[i] *= rates[i][1]
            seconds += len(growing) * each + drafting + (start + len(growing) * fixed if length == 1 else 0.0)
            if tokens / seconds > goodput:
                goodput, best = tokens / seconds, lengths.copy()
        return best
