"""What is learnt while serving: how many drafted tokens are accepted, and what steps and proposals cost."""

from __future__ import annotations

from collections import defaultdict

# Each new observation multiplies the weight of older ones by this, so that about the last fifty count.
_KEPT = 0.98
# The acceptance rate that is assumed before any drafted token was verified.
_UNKNOWN_RATE = 0.5
# The rate of all requests counts as much as this many proposals for the request itself.
_WEIGHT_OF_ALL = 12.0
# The time that a drafted token for each request adds to a plain step, relative to it, before it was measured.
_UNKNOWN_COST = 0.5
# A step counts as at most this many times as long as expected, for what made it longer is not the step's own work.
_MOST_SURPRISE = 1.3
# Catching up counts as needed by none of so many proposals before the first, which reads whole prompts.
_NEEDED_NOTHING = 50.0


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


class Cost:
    """What a thing costs, with a fixed part for each group of them: a least-squares fit in which older costs fade.

    The fixed part counts as observed once to be 0.  So where all groups have had the same size it is taken to be small.
    """

    def __init__(self) -> None:
        # Of groups^2, groups * things, things^2, groups * cost and things * cost.
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)

    def add(self, num_groups: float, num_things: float, cost: float) -> None:
        """Take in the cost of `num_things` in `num_groups`; both may be shares of a whole."""
        gg, gt, tt, gc, tc = (_KEPT * total for total in self._sums)
        g, t = num_groups, num_things
        self._sums = gg + g * g, gt + g * t, tt + t * t, gc + g * cost, tc + t * cost

    def parts(self) -> tuple[float, float]:
        """Return the fixed part and that of each thing, neither negative; 0 before anything was observed."""
        gg, gt, tt, gc, tc = self._sums
        if not tt:
            return 0.0, 0.0
        fixed = (tt * gc - gt * tc) / ((gg + 1) * tt - gt * gt)
        if fixed < 0:
            return 0.0, max(tc / tt, 0.0)
        each = (tc - gt * fixed) / tt
        return (fixed, each) if each > 0 else (max(gc / (gg + 1), 0.0), 0.0)


def load_class(num_requests: int) -> int:
    """Return a number for the loads from one power of two to the next, which are taken to be alike."""
    return num_requests.bit_length()


class Costs:
    """Seconds of plain steps, of proposals that they verify, and of drafting.

    What proposals add to a step, and what drafting takes, is learnt relative to a plain step of as many requests.  A
    draft's share is about the same under all loads; that of verification is learnt apart for each class of them.
    """

    def __init__(self) -> None:
        self._plain: defaultdict[int, Mean] = defaultdict(Mean)  # seconds, by number of requests
        self._verification: defaultdict[int, Cost] = defaultdict(_unknown_cost)  # by class of loads
        self._drafting = Cost()  # relative to a plain step
        self._catching_up: defaultdict[int, Mean] = defaultdict(_unneeded)  # seconds, by class of loads

    def step(self, num_requests: int, num_proposals: int, num_drafted: int, seconds: float) -> None:
        """Take in the time of a step in which `num_proposals` of the requests had `num_drafted` tokens in all."""
        is_first = num_requests not in self._plain
        if num_drafted == 0:
            most = seconds if is_first else _MOST_SURPRISE * self.plain(num_requests)
            self._plain[num_requests].add(min(seconds, most), 1)
        elif not is_first:
            plain, (fixed, each) = self.plain(num_requests), self.verification(num_requests)
            most = _MOST_SURPRISE * (plain + num_proposals * fixed + num_drafted * each)
            shares = num_proposals / num_requests, num_drafted / num_requests
            self._verification[load_class(num_requests)].add(*shares, min(seconds, most) / plain - 1)

    def proposal(self, num_requests: int, length: int, seconds: float) -> None:
        """Take in the time of drafting up to `length` tokens, at least 1, for each of some of the requests."""
        weight = self.plain(num_requests) / max(seconds, 1e-6)  # the longer it took by chance, the less it counts
        self._drafting.add(weight, length * weight, 1)

    def caught_up(self, num_requests: int, seconds: float) -> None:
        """Take in the time of what a proposal for all requests needed before it."""
        self._catching_up[load_class(num_requests)].add(seconds, 1)

    def knows(self, num_requests: int) -> bool:
        """Return whether a plain step of `num_requests` was timed, which all but `caught_up` and `step` need."""
        return num_requests in self._plain

    def plain(self, num_requests: int) -> float:
        """Return the seconds of a step without drafted tokens."""
        return self._plain[num_requests].value()

    def verification(self, num_requests: int) -> tuple[float, float]:
        """Return the seconds that a proposal adds to a step, and those that each token of it adds besides."""
        fixed, each = self._verification[load_class(num_requests)].parts()
        per_request = self.plain(num_requests) / num_requests
        return fixed * per_request, each * per_request

    def catching_up(self, num_requests: int) -> float:
        """Return the seconds of what a proposal for all requests needs before it."""
        return self._catching_up[load_class(num_requests)].value()

    def drafting(self, num_requests: int) -> tuple[float, float]:
        """Return the seconds that drafting takes for this many requests, and those that each token adds.

        Both are 0 before anything was drafted.
        """
        fixed, each = self._drafting.parts()
        return fixed * self.plain(num_requests), each * self.plain(num_requests)


def _unknown_cost() -> Cost:
    cost = Cost()
    cost.add(1, 1, _UNKNOWN_COST)
    return cost


def _unneeded() -> Mean:
    mean = Mean()
    mean.add(0.0, _NEEDED_NOTHING)
    return mean
