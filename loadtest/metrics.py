"""The figures of a run by name, and of several repetitions of it.

Figures are over all requests of the run, from the first that was sent to the end of the last.  The times in which a
batch fills and drains count: all that are compared have the same requests, and both are part of what a policy costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from math import ceil
from os.path import commonprefix
from statistics import median
from typing import Any, NamedTuple, TypeVar

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from shoal.loadtest.records import GENERATE, Load, RequestRecord, Run, Setup
from shoal.loadtest.trace import stays
from shoal.scheduler.step_record import StepRecord

T = TypeVar("T")

Figures = dict[str, float]
"""Figures by name, as docs/loadtest/files.md lists them; latencies in seconds, shares as parts of one.

What was not measured is absent.  The figures of a client or priority are named "client NAME: FIGURE" and so on.
"""

MAX_GROUPS = 8  # of a kind: more clients are neither picture nor table
WORDS = {"ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "e2e": "end-to-end", "kv": "KV", "throughput": "tokens/s"}


def words(name: str) -> str:
    """A figure's name as people write it."""
    return " ".join(WORDS.get(word, word) for word in name.split())


class Slo(Struct, frozen=True, kw_only=True):
    """What a request must keep to count for goodput, in seconds; an answer of one token has no TPOT."""

    ttft: float = 1.0
    tpot: float = 0.1


DEFAULT_SLO = Slo()


class Measured(Struct, kw_only=True):
    """Repetitions of a run: of each figure by itself the median, the least and the most."""

    num_runs: int
    median: Figures
    least: Figures
    most: Figures


def by(items: Iterable[T], attribute: str) -> dict[Any, list[T]]:
    """The items by an attribute of theirs, in the order in which its values appear."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(getattr(item, attribute), []).append(item)
    return groups


def summarize(run: Run, slo: Slo = DEFAULT_SLO) -> Figures:
    """The figures of a run, whole or broken off."""
    answered = [record for record in run.requests if record.is_answered]
    begin = min((record.sent_at for record in run.requests), default=0.0)
    seconds = max([begin, *map(_last_seen, run.requests)]) - begin
    in_batch = stays(chain(run.steps, *run.other_steps))
    admitted = [r.token_times[0] - in_batch[r.engine_id].joined_at for r in answered if r.engine_id in in_batch]
    good = [record for record in answered if _keeps(record, slo)]
    num_accepted = sum(record.num_accepted_tokens for record in answered)
    num_drafted = num_accepted + sum(record.num_rejected_tokens for record in answered)
    figures = of_requests(answered, seconds) | {
        "requests": len(run.requests),
        "errors": len(run.requests) - len(answered),
        "seconds": seconds,
        "request rate": _rate(len(answered), seconds),
        "goodput": _rate(len(good), seconds),
        "goodput share": _rate(len(good), len(run.requests)),
        **quantiles("ttft from admission", admitted),
        **quantiles("queueing", [stay.joined_at - stay.arrived_at for stay in in_batch.values()]),
    }
    if figures["prompt tokens"]:
        figures["cached share"] = sum(record.num_cached_tokens for record in answered) / figures["prompt tokens"]
    if num_drafted:
        figures["acceptance rate"] = num_accepted / num_drafted
    if (index := fairness(run.requests, begin + seconds)) is not None:
        figures["jain"] = index
    if run.generator_cpu_seconds:  # a simulation has no processor time
        figures["generator cores per 1000"] = _rate(1000 * run.generator_cpu_seconds, figures["output tokens"])
        for process in ("generator", "api", "engine"):
            figures[f"{process} cores"] = _rate(getattr(run, f"{process}_cpu_seconds"), seconds)
    for kind in ("client", "priority"):
        for name, own in sorted(by(answered, kind).items()):
            if len(own) < len(answered):
                figures |= {f"{kind} {name}: {key}": value for key, value in of_requests(own, seconds).items()}
    return figures | _of_steps(run.steps, run.server.limits.block_size)


def combine(repetitions: Sequence[Figures]) -> Measured:
    """The figures of at least one repetition together; a figure that some lack is that of the others."""
    names = dict.fromkeys(name for figures in repetitions for name in figures)
    values = {name: [figures[name] for figures in repetitions if name in figures] for name in names}
    own_median, least, most = ({name: of(own) for name, own in values.items()} for of in (median, min, max))
    return Measured(num_runs=len(repetitions), median=own_median, least=least, most=most)


def quantiles(name: str, values: Sequence[float] | NDArray[np.float64]) -> Figures:
    """p50, p90, p99 and mean, interpolated between values; nothing of no values."""
    if not len(values):
        return {}
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99)).tolist()
    return {f"{name} p50": p50, f"{name} p90": p90, f"{name} p99": p99, f"{name} mean": float(np.mean(values))}


def latencies(answered: Iterable[RequestRecord]) -> dict[str, list[float]]:
    """TTFT, ITL, TPOT and end-to-end latency of requests that were answered; one token alone has no TPOT."""
    found: dict[str, list[float]] = {"ttft": [], "itl": [], "tpot": [], "e2e": []}
    for record in answered:
        times = record.token_times
        found["ttft"].append(times[0] - record.sent_at)
        found["itl"] += np.diff(times).tolist()
        if record.num_output_tokens > 1:
            found["tpot"].append((times[-1] - times[0]) / (record.num_output_tokens - 1))
        found["e2e"].append(_last_seen(record) - record.sent_at)
    return found


def groups(cells: Iterable[Cell]) -> dict[str, list[str]]:
    """The clients and the priorities of which cells have figures, where there are several of a kind, but not many."""
    names = dict.fromkeys(name.rpartition(": ")[0] for cell in cells for name in cell.measured.median)
    found = {kind: [name for name in names if name.startswith(f"{kind} ")] for kind in ("client", "priority")}
    return {kind: own for kind, own in found.items() if 1 < len(own) <= MAX_GROUPS}


def _keeps(record: RequestRecord, slo: Slo) -> bool:
    own = latencies([record])
    return own["ttft"][0] <= slo.ttft and max(own["tpot"], default=0.0) <= slo.tpot


def _last_seen(record: RequestRecord) -> float:
    return max(record.sent_at, record.finished_at or 0.0, *record.token_times[-1:])


def of_requests(answered: Sequence[RequestRecord], seconds: float) -> Figures:
    """Figures that all requests have, and each group of them."""
    num_tokens = sum(record.num_output_tokens for record in answered)
    figures = {
        "throughput": _rate(num_tokens, seconds),
        "requests": len(answered),
        "prompt tokens": sum(record.num_prompt_tokens for record in answered),
        "output tokens": num_tokens,
    }
    for name, values in latencies(answered).items():
        figures |= quantiles(name, values)
    return figures


def _rate(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _of_steps(steps: Sequence[StepRecord], block_size: int) -> Figures:
    """Figures of the engine; means are over time."""
    seconds = np.array([step.seconds for step in steps])
    if not seconds.any():
        return {}
    counts = [
        (
            len(step.shares),
            sum(share.is_padding for share in step.shares),
            sum(share.num_scheduled_tokens for share in step.shares),
            step.num_used_blocks / step.num_blocks,
            step.num_used_blocks * block_size,
            step.num_kv_tokens,
        )
        for step in steps
    ]
    rows, padding, tokens, usage, slots, filled = np.average(counts, axis=0, weights=seconds).tolist()
    return {
        "steps": len(steps),
        "step seconds": float(seconds.mean()),
        "row seconds": float(seconds.sum() / sum(len(step.shares) for step in steps)),
        "tokens per step": tokens,
        "batch": rows - padding,
        "padding rows": padding,
        "padding share": padding / rows,
        "kv usage": usage,
        "kv usage peak": max(step.num_used_blocks / step.num_blocks for step in steps),
        "kv utilisation": filled / slots if slots else 1.0,
        "kv waste": (slots - filled) / block_size / rows,
        "preemptions": sum(step.num_preemptions for step in steps),
    }


# -- fairness ----------------------------------------------------------------------------------------------------------

MOMENTS = 100  # in each second, at which it is looked who waits


def jain(shares: Sequence[float] | NDArray[np.float64]) -> float:
    """Jain's index of shares, not all of them 0: 1 if all are the same, 1/n if one of n has everything (1984)."""
    return float(np.sum(shares) ** 2 / (len(shares) * np.sum(np.square(shares))))


def fairness(records: Iterable[RequestRecord], end: float) -> float | None:
    """Jain's index of the clients' service, the mean over windows of a second; None if never two asked at once.

    Service is counted as in VTC (Sheng et al. 2024, "Fairness in Serving Large Language Models"): one for a token of
    a prompt, two for an output token, each when its user saw it.  The share of a client that is backlogged in a window
    is its service over that of the client that was served most.  A client is backlogged if some request of it waits for
    its first token at every moment.  The share of any other client that asks is 1: it gets all that it asks for.

    Args:
        end: of the run; a request that was never answered is taken to wait until then.
    """
    clients = by(records, "client").values()
    if len(clients) < 2 or end <= 0:
        return None
    windows = np.arange(ceil(end) + 1)
    moments = (np.arange(ceil(end) * MOMENTS) + 0.5) / MOMENTS
    service, active, backlogged = [], [], []
    for own in clients:
        times_of_requests = (
            [record.sent_at for record in own],
            [record.token_times[0] if record.token_times else record.finished_at or end for record in own],
            [record.finished_at or end for record in own],
        )
        num_sent, num_begun, num_ended = (
            np.searchsorted(np.sort(times), moments).reshape(-1, MOMENTS) for times in times_of_requests
        )
        prompts = [(record.token_times[0], record.num_prompt_tokens) for record in own if record.token_times]
        outputs = [(t, 2 * r.num_output_tokens / len(r.token_times)) for r in own for t in r.token_times]
        times, weights = np.array(prompts + outputs).reshape(-1, 2).T
        service.append(np.histogram(times, windows, weights=weights)[0])
        active.append((num_sent > num_ended).any(axis=1) | (service[-1] > 0))
        backlogged.append((num_sent > num_begun).all(axis=1))
    most = np.max(service, axis=0)
    shares = np.divide(service, most, out=np.ones_like(service), where=np.array(backlogged) & (most > 0))
    indices = [jain(own[asked]) for own, asked in zip(shares.T, np.transpose(active), strict=True) if asked.sum() >= 2]
    return float(np.mean(indices)) if indices else None


# -- predicted beside measured -----------------------------------------------------------------------------------------

# By figure that is compared, the error that a prediction should not exceed; those of the medians are Vidur's (Agrawal
# et al. 2024).  None where nothing is promised.
_LIMITS: dict[str, float | None] = {
    "throughput": 0.09,
    **{"ttft p50": 0.09, "ttft p90": None, "ttft p99": 0.15},
    **{"itl p50": None, "itl p90": None, "itl p99": None},
    **{"e2e p50": 0.09, "e2e p90": None, "e2e p99": 0.15},
}


class Error(NamedTuple):
    """The error of a prediction, as a share of what was measured, and the limit that it should not exceed."""

    predicted: float
    measured: float
    error: float
    limit: float | None

    @property
    def is_within(self) -> bool:
        return self.limit is None or abs(self.error) <= self.limit


# -- cells -------------------------------------------------------------------------------------------------------------


class Cell(Struct, kw_only=True):
    """One setup under one load of one workload.

    Attributes:
        section: what it is compared within: the workload, and the options of the servers where they differ.
        measured: figures of its complete runs; of all of them if none is complete.
        run: the first of those runs, which the pictures show.
        predicted: the twin's figures, if it was asked.
        problems: what went wrong in its runs, in words.
    """

    section: str
    workload: str
    load: Load
    setup: Setup
    measured: Measured
    run: Run
    predicted: Figures | None = None
    problems: list[str]

    @property
    def errors(self) -> dict[str, Error]:
        """The errors of the twin's throughput and latencies, as far as both sides have them, and not 0."""
        predicted, measured = self.predicted or {}, self.measured.median
        return {
            name: Error(predicted[name], measured[name], predicted[name] / measured[name] - 1, limit)
            for name, limit in _LIMITS.items()
            if name in predicted and measured.get(name)
        }


def collect(runs: Iterable[Run], predictions: Iterable[Run] = (), slo: Slo = DEFAULT_SLO) -> list[Cell]:
    """Put the repetitions of each combination together, and beside them what the twin predicts.

    The steps of one run of each combination are kept, so that `runs` may be read from files one by one.

    Args:
        runs: measured, in any order; workloads and setups are shown in the order of their first runs, loads from little
            to much, closed loops first.
        predictions: simulated; those of a combination that was not measured are left out.
    """

    def combination(run: Run) -> tuple[str, Load, Setup]:
        return run.workload, replace(run.load, seed=0), run.setup  # the seed of arrivals may differ

    repetitions: dict[tuple[str, Load, Setup], list[tuple[Run, Figures, list[str]]]] = {}
    for run in runs:
        own = repetitions.setdefault(combination(run), [])
        own.append((run, summarize(run, slo), list(problems(run))))
        if len(own) > 1 and own[0][0].is_complete:
            run.steps, run.other_steps = [], []  # of one run they are enough
    predicted = {combination(run): summarize(run, slo) for run in predictions}
    workloads = list(dict.fromkeys(workload for workload, _, _ in repetitions))
    setups = list(dict.fromkeys(setup for _, _, setup in repetitions))
    cells = []
    for workload, load, setup in sorted(
        repetitions, key=lambda key: (workloads.index(key[0]), key[1].rate, key[1].users, setups.index(key[2]))
    ):
        own = repetitions[workload, load, setup]
        shown = [one for one in own if one[0].is_complete] or own
        common = commonprefix([other.options for name, _, other in repetitions if name == workload])  # noqa: RUF071 -- of tuples
        cells.append(
            Cell(
                section=", ".join(filter(None, [workload, " ".join(setup.options[len(common) :])])),
                workload=workload,
                load=load,
                setup=setup,
                measured=combine([figures for _, figures, _ in shown]),
                run=shown[0][0],
                predicted=predicted.get((workload, load, setup)),
                problems=[problem for _, _, found in own for problem in found],
            )
        )
    return cells


def problems(run: Run) -> Iterable[str]:
    """What went wrong in a run, a sentence each."""
    where = f"{run.workload}, {run.load}, {run.setup.name}, repetition {run.repetition + 1}"
    if not run.is_complete:
        yield f"{where} broke off: {sum(record.is_answered for record in run.requests)} requests had been answered."
    errors = Counter(record.error for record in run.requests if record.error is not None)
    for error, _ in errors.most_common(1):
        yield f"{where}: {errors.total()} of {len(run.requests)} requests were not answered, most often: {error}."
    if not run.steps and run.setup.policy != GENERATE:
        yield f"{where}: there is no trace of the engine's steps."


def baseline(cells: Iterable[Cell]) -> Cell | None:
    """The static baseline among cells of one load: with padding rows, or else without; never with speculation."""
    plain = {cell.setup.policy: cell for cell in cells if cell.setup.speculation == "off"}
    return plain.get("static") or plain.get("static-nopad")


def generated(cells: Iterable[Cell]) -> Cell | None:
    """Hugging Face's `generate` among cells of one load."""
    return next((cell for cell in cells if cell.setup.policy == GENERATE), None)


def speed_up(name: str, cell: Cell, base: Cell | None) -> float | None:
    """How many times better a figure is than the baseline's: throughput higher, or a latency lower."""
    own, other = (one.measured.median.get(name) if one else None for one in (cell, base))
    if not own or not other:
        return None
    return own / other if name == "throughput" else other / own
