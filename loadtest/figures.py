"""The figures of a summary by name: what the tables show, in which order and unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from math import isfinite

from shoal.loadtest.metrics import EngineSummary, Quantiles, Summary

NOTHING = "–"  # noqa: RUF001 -- the dash of an empty cell


class Unit(Enum):
    """What a value is written in; latencies are kept in seconds, shares as parts of one."""

    NUMBER = ""
    SECONDS = "ms"
    SHARE = "%"


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure; `read` gives None where there was nothing to measure."""

    name: str
    unit: Unit
    read: Callable[[Summary], float | None]

    @property
    def heading(self) -> str:
        """The name with its unit."""
        return f"{self.name} [{self.unit.value}]" if self.unit.value else self.name


def _latency(name: str, read: Callable[[Summary], Quantiles | None], *which: str) -> Iterable[Figure]:
    def quantile(which: str) -> Callable[[Summary], float | None]:
        return lambda summary: None if (found := read(summary)) is None else getattr(found, which)

    return (Figure(f"{name}, {each}", Unit.SECONDS, quantile(each)) for each in which)


def _of_engine(name: str, unit: Unit, read: Callable[[EngineSummary], float]) -> Figure:
    return Figure(name, unit, lambda summary: None if summary.engine is None else read(summary.engine))


THROUGHPUT = Figure("output tokens/s", Unit.NUMBER, lambda summary: summary.throughput)
GOODPUT = Figure("goodput, requests/s", Unit.NUMBER, lambda summary: summary.goodput)
TTFT = tuple(_latency("TTFT", lambda summary: summary.ttft, "p50", "p90", "p99"))
ITL = tuple(_latency("ITL", lambda summary: summary.itl, "p50", "p90", "p99"))
TPOT = tuple(_latency("TPOT", lambda summary: summary.tpot, "p50", "p99"))
END_TO_END = tuple(_latency("end-to-end", lambda summary: summary.e2e, "p50", "p90", "p99", "mean"))
QUEUEING = tuple(_latency("queueing", lambda summary: summary.queueing, "p50", "p90", "p99"))

GROUPS: dict[str, tuple[Figure, ...]] = {
    "Throughput": (
        THROUGHPUT,
        Figure("requests/s", Unit.NUMBER, lambda summary: summary.request_rate),
        GOODPUT,
        Figure("goodput, share of requests", Unit.SHARE, lambda summary: summary.goodput_share),
    ),
    "Latency": (*TTFT, *ITL, *TPOT, *END_TO_END, *QUEUEING),
    "Batch": (
        _of_engine("rows that work, mean", Unit.NUMBER, lambda engine: engine.batch_size),
        _of_engine("padding rows, share of all", Unit.SHARE, lambda engine: engine.padding_share),
        _of_engine("tokens a step, mean", Unit.NUMBER, lambda engine: engine.tokens_per_step),
        _of_engine("step, mean", Unit.SECONDS, lambda engine: engine.step_seconds),
        _of_engine("preemptions", Unit.NUMBER, lambda engine: engine.num_preemptions),
        Figure("drafted tokens accepted", Unit.SHARE, lambda summary: summary.acceptance_rate),
    ),
    "KV cache": (
        _of_engine("usage, mean", Unit.SHARE, lambda engine: engine.kv_usage),
        _of_engine("usage, peak", Unit.SHARE, lambda engine: engine.kv_usage_peak),
        _of_engine("utilisation of owned blocks", Unit.SHARE, lambda engine: engine.kv_utilisation),
        _of_engine("waste, blocks a row", Unit.NUMBER, lambda engine: engine.kv_waste),
        Figure("prompt tokens found in it", Unit.SHARE, lambda summary: summary.cached_share),
    ),
    "Fairness": (Figure("Jain's index over clients", Unit.NUMBER, lambda summary: summary.jain),),
}
BRIEF = (
    THROUGHPUT,
    GOODPUT,
    TTFT[0],
    TTFT[2],
    ITL[0],
    ITL[2],
    END_TO_END[0],
    END_TO_END[3],
    END_TO_END[2],
    QUEUEING[0],
)
GENERATOR = (
    Figure("share of a core", Unit.SHARE, lambda summary: summary.generator_cores),
    Figure("for each 1,000 output tokens/s", Unit.SHARE, lambda summary: summary.generator_cores_per_1000),
)


def title(name: str) -> str:
    """A figure of `loadtest/accuracy.py` as people write it."""
    words = {"ttft": "TTFT", "itl": "ITL", "e2e": "end-to-end"}
    return " ".join(words.get(word, word) for word in name.split())


def group_name(group: str | int) -> str:
    """A client, or a priority."""
    return f"priority {group}" if isinstance(group, int) else group or "no client"


def quotient(value: float | None, by: float | None) -> float | None:
    """None where there is nothing to divide, or by."""
    return value / by if value is not None and by else None


def text(unit: Unit, value: float) -> str:
    """A value as the tables have it, the unit left to the heading."""
    if unit is Unit.SHARE:
        return f"{100 * value:.1f}"
    return number(1e3 * value if unit is Unit.SECONDS else value)


def number(value: float) -> str:
    """Three digits, or all of a large number."""
    if not isfinite(value):
        return NOTHING
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".") if value else "0"
