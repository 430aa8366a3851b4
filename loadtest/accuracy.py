"""Predicted beside measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Spread(Protocol):
    """A latency's quantiles, in seconds; `loadtest.metrics.Quantiles` has them."""

    @property
    def p50(self) -> float: ...
    @property
    def p90(self) -> float: ...
    @property
    def p99(self) -> float: ...


class Figures(Protocol):
    """What is compared; `loadtest.metrics.Summary` has it.  None where there is no measurement."""

    @property
    def throughput(self) -> float: ...
    @property
    def ttft(self) -> Spread | None: ...
    @property
    def itl(self) -> Spread | None: ...
    @property
    def e2e(self) -> Spread | None: ...


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure, predicted and measured.

    Attributes:
        name: `throughput` (tokens/s), or latency and quantile as in `ttft p50` (seconds).
        error: of the prediction, as a share of what was measured; None if that is 0.
        limit: what the error should keep within; None where nothing is promised.
    """

    name: str
    predicted: float
    measured: float
    limit: float | None

    @property
    def error(self) -> float | None:
        return self.predicted / self.measured - 1 if self.measured else None

    @property
    def is_within(self) -> bool:
        """Whether the error keeps within the limit."""
        return self.limit is None or (self.error is not None and abs(self.error) <= self.limit)


# Of the medians: Vidur's (Agrawal et al. 2024).
_LIMITS = {
    "throughput": 0.09,
    "ttft p50": 0.09,
    "e2e p50": 0.09,
    "ttft p99": 0.15,
    "e2e p99": 0.15,
}


def compare(predicted: Figures, measured: Figures) -> list[Figure]:
    """All figures that both have."""
    pairs = {"throughput": (predicted.throughput, measured.throughput)}
    for latency in ("ttft", "itl", "e2e"):
        ours, theirs = getattr(predicted, latency), getattr(measured, latency)
        if ours is not None and theirs is not None:
            for quantile in ("p50", "p90", "p99"):
                pairs[f"{latency} {quantile}"] = getattr(ours, quantile), getattr(theirs, quantile)
    return [Figure(name, *pair, _LIMITS.get(name)) for name, pair in pairs.items()]
