"""What is learnt while serving: how many drafted tokens are accepted, and what steps and proposals cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

# Each new observation multiplies the weight of older ones by this, so that about the last fifty count.
_KEPT = 0.98
# The acceptance rate that is assumed before any drafted token was verified.
_UNKNOWN_RATE = 0.5
# The rate of all requests counts as much as this many proposals for the request itself.
_WEIGHT_OF_ALL = 12.0
# The cost of a row with a drafted token, relative to a row of a plain step, that is assumed before it was measured.
_UNKNOWN_COST = 0.3
# A step counts as at most this many times as long as expected, for what made it longer is not the step's own work.
_MOST_SURPRISE = 2.0


class Mean:
    """A weighted mean in which each new observation fades those before it."""

    def __init__(self) -> None:
        self._total = self._weight = 0.0

    def add(self, total: float, weight: float) -> None:
        """Take in observations: the sum of their weights, and the sum of their values times their weights."""
        self._total = _KEPT * self._total + total
        self._weight = _KEPT * self._weight + weight

    def value(self, prior: float = 0.0, weight: float = 0.0) -> float:
        """Return the mean, with `prior` as one more observation of this weight."""
        return (self._total + weight * prior) / (self._weight + weight)


class Acceptance:
    """How likely drafted tokens are to be accepted: the first of a proposal, and each further one if the first was."""

    def __init__(self) -> None:
        self._first, self._further = Mean(), Mean()

    def count(self, num_drafted: int, num_accepted: int) -> None:
        """Take in that `num_accepted` of `num_drafted` tokens, at least 1, were accepted."""
        num_judged = min(num_accepted + 1, num_drafted)  # nothing is learnt of what follows a rejected token
        self._first.add(min(num_accepted, 1), 1)
        self._further.add(max(num_accepted - 1, 0), num_judged - 1)

    def rates(self, all_requests: Acceptance) -> tuple[float, float]:
        """Return both rates; `all_requests` tells what to expect as long as little is known."""
        first = self._first.value(all_requests._first.value(_UNKNOWN_RATE, 1), _WEIGHT_OF_ALL)
        return first, self._further.value(all_requests._further.value(first, 1), _WEIGHT_OF_ALL)


def load_class(num_requests: int) -> int:
    """Return a number for the loads from one power of two to the next, which are taken to be alike."""
    return num_requests.bit_length()


class Costs:
    """Seconds of plain steps, of rows with drafted tokens in them, and of drafting.

    What a drafted token adds to a step is learnt apart for each class of loads, and relative to a plain step: a row
    more for the same request costs less than a row for another one.  The same is assumed for each drafted token, which
    is close enough to the truth near the lengths that were measured last.
    """

    def __init__(self) -> None:
        self._plain: defaultdict[int, Mean] = defaultdict(Mean)  # seconds, by number of requests
        self._rows: defaultdict[int, Mean] = defaultdict(Mean)  # a drafted row over a plain one, by class of loads
        self._drafting: defaultdict[int, Mean] = defaultdict(Mean)  # seconds of a token each, by class of loads

    def step(self, num_requests: int, num_drafted: int, seconds: float) -> None:
        """Take in the time of a step with `num_drafted` tokens besides one for each request."""
        is_first = num_requests not in self._plain
        if num_drafted == 0:
            most = seconds if is_first else _MOST_SURPRISE * self.plain(num_requests)
            self._plain[num_requests].add(min(seconds, most), 1)
        elif not is_first:
            plain, per_request = self.plain(num_requests), num_drafted / num_requests
            most = _MOST_SURPRISE * (plain + num_drafted * self.row(num_requests))
            extra = min(seconds, most) / plain - 1
            self._rows[load_class(num_requests)].add(extra * per_request, per_request**2)  # least squares

    def proposal(self, lengths: Sequence[int], seconds: float) -> None:
        """Take in the time of a proposal; `lengths` are at least one, each at least 1."""
        self._drafting[load_class(len(lengths))].add(seconds * max(lengths), max(lengths) ** 2)

    def knows(self, num_requests: int) -> bool:
        """Return whether a plain step of `num_requests` was timed, which `plain` and `row` need."""
        return num_requests in self._plain

    def plain(self, num_requests: int) -> float:
        """Return the seconds of a step without drafted tokens."""
        return self._plain[num_requests].value()

    def row(self, num_requests: int) -> float:
        """Return the seconds that a drafted token adds to a step."""
        relative = self._rows[load_class(num_requests)].value(_UNKNOWN_COST, 1)
        return relative * self.plain(num_requests) / num_requests

    def drafting(self, num_requests: int) -> float:
        """Return the seconds of drafting a token for each request; 0 before anything was drafted."""
        if not self._drafting:
            return 0.0
        wanted = load_class(num_requests)
        return self._drafting[min(self._drafting, key=lambda known: abs(known - wanted))].value()
