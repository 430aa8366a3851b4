"""What steps and proposals cost, learnt while they are made."""

from __future__ import annotations

import math
from bisect import bisect_left, insort

LEAST_SHARE_OF_NEWEST = 0.05
# What else happens on the machine only ever adds: a step that took less than known says more than one that took more.
_WEIGHT_OF_LESS = 4


class StepCosts:
    """Seconds of a step by its number of tokens: a running mean for each number, or band of large ones."""

    def __init__(self) -> None:
        self._sizes: list[int] = []  # those that were seen, ascending
        self._seconds: dict[int, float] = {}
        self._counts: dict[int, int] = {}

    def observe(self, num_tokens: int, seconds: float, least_share: float = LEAST_SHARE_OF_NEWEST) -> None:
        """A step of so many tokens took so long; the mean moves at least by this share of the difference."""
        size = _band(num_tokens)
        known = self._seconds.get(size)
        if known is None:
            insort(self._sizes, size)
            self._seconds[size], self._counts[size] = seconds, 1
        else:
            self._counts[size] += 1
            share = max(1 / self._counts[size], least_share)
            share = min(1.0, _WEIGHT_OF_LESS * share) if seconds < known else share
            self._seconds[size] = known + share * (min(seconds, 2 * known) - known)

    @property
    def least(self) -> int:
        """The smallest size that was seen."""
        return self._sizes[0]

    def predict(self, num_tokens: int) -> float | None:
        """Seconds of a step of so many tokens, on the line through the two sizes around it, or the two nearest ones.

        None if none of so few tokens was seen yet, or none of half as many.
        """
        size = _band(num_tokens)
        if not self._sizes or not self._sizes[0] <= size <= 2 * self._sizes[-1]:
            return None
        index = bisect_left(self._sizes, size)
        if index < len(self._sizes) and self._sizes[index] == size:
            return self._seconds[size]
        upper = self._sizes[min(index, len(self._sizes) - 1)]
        lower = self._sizes[max(min(index, len(self._sizes) - 1) - 1, 0)]
        if lower == upper:
            return self._seconds[upper]
        slope = (self._seconds[upper] - self._seconds[lower]) / (upper - lower)
        return self._seconds[upper] + max(slope, 0.0) * (size - upper)


class ProposalCosts:
    """Seconds that guessing takes, by the number of requests and the tokens for each."""

    def __init__(self) -> None:
        self._counts: list[int] = []  # of requests, those that were seen, ascending
        self._costs: dict[int, StepCosts] = {}

    def observe(
        self, num_requests: int, num_tokens: int, seconds: float, least_share: float = LEAST_SHARE_OF_NEWEST
    ) -> None:
        """Guessing so many tokens for each of so many requests took so long."""
        if num_requests not in self._costs:
            insort(self._counts, num_requests)
            self._costs[num_requests] = StepCosts()
        self._costs[num_requests].observe(num_tokens, seconds, least_share)

    def predict(self, num_requests: int, num_tokens: int) -> float | None:
        """Seconds, as those of the nearest number of requests that was seen; nothing before any was.

        None if more than twice as many tokens are asked for as were ever guessed there.
        """
        if not self._counts:
            return 0.0
        costs = self._costs[min(self._counts, key=lambda count: abs(count - num_requests))]
        return costs.predict(max(num_tokens, costs.least))


def _band(num_tokens: int) -> int:
    """The number itself up to 32; above, the lower end of a band of about a tenth."""
    if num_tokens <= 32:
        return num_tokens
    return int(2 ** (math.floor(7 * math.log2(num_tokens)) / 7))
