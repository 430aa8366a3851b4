"""What speculation gave, against what was expected of it."""

from __future__ import annotations

from shoal.model.speculation.costs import StepCosts

# Share of the newest step in the mean.  What is accepted is luck in part, and more so the fewer requests there are.
_NEWEST_OF_ONE, _MOST_OF_NEWEST = 0.02, 0.1
_FADES = 0.05  # of what was missed, while nothing is tried
_LEAST_GAIN = 0.5  # that a step is believed to have had; what makes it less is something else on the machine


class Yields:
    """The gain that came of steps with drafted tokens, as a share of the gain that was expected of them.

    A running mean by the number of requests, in bands of powers of two: with few of them it is the work around a guess
    that is underestimated, with many the step.
    """

    def __init__(self) -> None:
        self._shares: dict[int, float] = {}
        self._expected: float | None = None
        self._guessing = 0.0  # seconds, for the step to come
        self._num_tokens, self._seconds = 0, 0.0  # of a step that is not settled yet, 0 if there is none
        self._num_drafted = self._num_accepted = 0

    def share(self, num_requests: int) -> float:
        """Of an expected gain what is likely to come of it; 1 before anything was seen."""
        return self._shares.get(num_requests.bit_length(), 1.0)

    def expect(self, gain: float | None) -> None:
        """The proposals to come are to speed things up by this factor; None: they are to show whether they could."""
        self._expected = gain

    def proposed(self, seconds: float) -> None:
        """Guessing for the next step took so long."""
        self._guessing += seconds

    def took(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        self._num_tokens, self._seconds = num_tokens, seconds + self._guessing
        self._num_drafted = self._num_accepted = 0
        self._guessing = 0.0

    def verified(self, num_drafted: int, num_accepted: int) -> None:
        """A proposal was verified in the step that was timed last."""
        self._num_drafted += num_drafted
        self._num_accepted += num_accepted

    def settle(self, costs: StepCosts) -> float:
        """Take in the step that was timed last, if tokens had been drafted for it; the seconds that it lost by them.

        What its tokens would have taken without guessing is known from `costs`; less than nothing is lost by a gain.
        """
        num_requests = self._num_tokens - self._num_drafted
        plain = costs.predict(num_requests) if self._num_tokens and self._num_drafted else None
        self._num_tokens = 0
        if plain is None:
            return 0.0
        usual = (1 + self._num_accepted / num_requests) * plain
        if self._expected is not None:
            self._compare(num_requests, max(usual / self._seconds, _LEAST_GAIN) / self._expected)
        return self._seconds - usual

    def _compare(self, num_requests: int, share: float) -> None:
        known = self.share(num_requests)
        newest = min(_NEWEST_OF_ONE * num_requests, _MOST_OF_NEWEST)
        self._shares[num_requests.bit_length()] = known + newest * (share - known)

    def fade(self) -> None:
        """Nothing was gained for a while: doubt what was seen, for it may not be so any more."""
        for band, share in self._shares.items():
            self._shares[band] = share + _FADES * (1.0 - share)
