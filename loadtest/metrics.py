"""The figures of a run by name, and of several repetitions of it.

Figures are over all requests of the run, from the first that was sent to the end of the last.  The set of requests is
the same for all that are compared, so neither the time in which a batch fills nor that in which it drains is cut away:
both are part of what a policy costs.  The requests that warm the server are sent before, and are no part of the run.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise
from math import ceil, floor
from statistics import median
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from shoal.loadtest.records import Load, RequestRecord, Run, Setup
from shoal.loadtest.trace import Stay, stays
from shoal.scheduler.step_record import StepRecord

Figures = dict[str, float]
"""Figures by name, as docs/loadtest/files.md lists them; latencies in seconds, shares as parts of one.

What was not measured is absent.  The figures of a client or priority are named "client NAME: FIGURE" and so on.
"""


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


def summarize(run: Run, slo: Slo = DEFAULT_SLO) -> Figures:
    """The figures of a run, whole or broken off."""
    begin = min((record.sent_at for record in run.requests), default=0.0)
    end = max(map(_last_seen, run.requests), default=begin)
    seconds = end - begin
    answered = [record for record in run.requests if record.is_answered]
    in_batch = stays(run.steps)
    num_good = sum(_keeps(record, slo) for record in answered)
    num_accepted = sum(record.num_accepted_tokens for record in answered)
    figures = _of_requests(answered, seconds) | {
        "requests": len(run.requests),
        "errors": len(run.requests) - len(answered),
        "prompt tokens": sum(record.num_prompt_tokens for record in answered),
        "seconds": seconds,
        "request rate": _ratio(len(answered), seconds) or 0.0,
        "goodput": _ratio(num_good, seconds) or 0.0,
        "goodput share": _ratio(num_good, len(run.requests)) or 0.0,
    }
    figures |= quantiles("ttft from admission", [_admitted_ttft(record, in_batch) for record in answered])
    figures |= quantiles("itl", chain.from_iterable(map(itl, answered)))
    figures |= quantiles("queueing", [stay.joined_at - stay.arrived_at for stay in in_batch.values()])
    optional = {
        "cached share": _ratio(sum(record.num_cached_tokens for record in answered), figures["prompt tokens"]),
        "acceptance rate": _ratio(num_accepted, num_accepted + sum(r.num_rejected_tokens for r in answered)),
        "jain": fairness(run.requests, end),
        "generator cores": _ratio(run.generator_cpu_seconds, seconds),
        "generator cores per 1000": _ratio(1000 * run.generator_cpu_seconds, figures["output tokens"]),
        "api cores": _ratio(run.api_cpu_seconds, seconds),
        "engine cores": _ratio(run.engine_cpu_seconds, seconds),
    }
    is_measured = bool(run.generator_cpu_seconds)  # a simulation has no processor time
    figures |= {
        name: value
        for name, value in optional.items()
        if value is not None and (is_measured or not name.endswith(("cores", "1000")))
    }
    for kind in ("client", "priority"):
        figures |= _of_groups(answered, seconds, kind)
    return figures | _of_steps(run.steps, run.server.limits.block_size)


def combine(repetitions: Sequence[Figures]) -> Measured:
    """The figures of at least one repetition together; a figure that some lack is that of the others."""

    def fold(function: Callable[[list[float]], float]) -> Figures:
        names = dict.fromkeys(chain.from_iterable(repetitions))
        return {name: function([one[name] for one in repetitions if name in one]) for name in names}

    return Measured(num_runs=len(repetitions), median=fold(median), least=fold(min), most=fold(max))


def quantiles(name: str, values: Iterable[float | None]) -> Figures:
    """p50, p90, p99 and mean, interpolated between values; None among them is left out."""
    known = [value for value in values if value is not None]
    if not known:
        return {}
    found = *np.quantile(known, (0.5, 0.9, 0.99)).tolist(), float(np.mean(known))
    return {f"{name} {which}": value for which, value in zip(("p50", "p90", "p99", "mean"), found, strict=True)}


# -- requests ----------------------------------------------------------------------------------------------------------


def ttft(record: RequestRecord) -> float | None:
    return record.token_times[0] - record.sent_at if record.token_times else None


def itl(record: RequestRecord) -> list[float]:
    return [after - before for before, after in pairwise(record.token_times)]


def tpot(record: RequestRecord) -> float | None:
    if record.num_output_tokens < 2 or not record.token_times:
        return None
    return (record.token_times[-1] - record.token_times[0]) / (record.num_output_tokens - 1)


def e2e(record: RequestRecord) -> float | None:
    return None if record.finished_at is None else record.finished_at - record.sent_at


def _admitted_ttft(record: RequestRecord, in_batch: dict[str, Stay]) -> float | None:
    stay = in_batch.get(record.engine_id)
    return record.token_times[0] - stay.joined_at if stay and record.token_times else None


def _keeps(record: RequestRecord, slo: Slo) -> bool:
    first, further = ttft(record), tpot(record)
    return first is not None and first <= slo.ttft and (further is None or further <= slo.tpot)


def _last_seen(record: RequestRecord) -> float:
    return max(record.sent_at, record.finished_at or 0.0, *record.token_times[-1:])


def _of_requests(answered: Sequence[RequestRecord], seconds: float) -> Figures:
    """Figures that all requests have, and each group of them."""
    num_tokens = sum(record.num_output_tokens for record in answered)
    counts = {
        "requests": len(answered),
        "output tokens": num_tokens,
        "throughput": _ratio(num_tokens, seconds) or 0.0,
    }
    latencies = {"ttft": ttft, "tpot": tpot, "e2e": e2e}
    return counts | {
        figure: value
        for name, read in latencies.items()
        for figure, value in quantiles(name, map(read, answered)).items()
    }


def _of_groups(answered: Sequence[RequestRecord], seconds: float, kind: str) -> Figures:
    groups: defaultdict[str | int, list[RequestRecord]] = defaultdict(list)
    for record in answered:
        groups[getattr(record, kind)].append(record)
    return {
        f"{kind} {name}: {figure}": value
        for name, own in sorted(groups.items(), key=lambda group: str(group[0]).zfill(12))
        if len(groups) > 1
        for figure, value in _of_requests(own, seconds).items()
    }


def groups(figures: Figures, kind: str) -> list[str]:
    """Names of the groups of a kind, "client" or "priority", that figures have."""
    return list(dict.fromkeys(name.partition(": ")[0] for name in figures if ": " in name and name.startswith(kind)))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


# -- steps -------------------------------------------------------------------------------------------------------------


def _of_steps(steps: Sequence[StepRecord], block_size: int) -> Figures:
    seconds = np.array([step.seconds for step in steps])
    if not seconds.sum():
        return {}

    def mean(values: Sequence[float]) -> float:
        return float(np.average(values, weights=seconds))

    padding = mean([sum(share.is_padding for share in step.shares) for step in steps])
    num_rows = mean([len(step.shares) for step in steps])
    used_slots = mean([step.num_used_blocks * block_size for step in steps])
    free_slots = used_slots - mean([step.num_kv_tokens for step in steps])
    usage = [step.num_used_blocks / step.num_blocks for step in steps]
    return {
        "steps": len(steps),
        "step seconds": float(seconds.mean()),
        "tokens per step": mean([sum(share.num_scheduled_tokens for share in step.shares) for step in steps]),
        "batch": num_rows - padding,
        "padding rows": padding,
        "padding share": padding / num_rows,
        "kv usage": mean(usage),
        "kv usage peak": max(usage),
        "kv utilisation": 1 - (_ratio(free_slots, used_slots) or 0.0),
        "kv waste": free_slots / block_size / num_rows,
        "preemptions": sum(step.num_preemptions for step in steps),
    }


# -- fairness ----------------------------------------------------------------------------------------------------------

WINDOW_SECONDS = 1.0
PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0  # service of a token, as in VTC


def jain(shares: Sequence[float]) -> float:
    """Jain's index of shares: 1 if all are the same, 1/n if one of n has everything (Jain et al. 1984)."""
    most = max(shares)
    if not most:
        return 1.0
    scaled = [share / most for share in shares]  # so that squares neither vanish nor overflow
    return sum(scaled) ** 2 / (len(scaled) * sum(share * share for share in scaled))


def fairness(records: Sequence[RequestRecord], end: float) -> float | None:
    """Jain's index of the clients' service, the mean over windows of a second; None if never two asked at once.

    Service is counted as in VTC (Sheng et al. 2024, "Fairness in Serving Large Language Models"): one for a token of
    a prompt, two for an output token, each when its user saw that it was done.  Only backlogged clients are compared,
    because a client that asked for little and got it was not wronged.  A client is backlogged in a window if some
    request of it waited for its first token at every moment.  Its share is its service over that of the client that was
    served most; the share of any other client that asked for something is 1.

    Args:
        end: of the run; a request that was never answered is taken to wait until then.
    """
    num_windows = ceil(end / WINDOW_SECONDS)
    clients: defaultdict[str, list[RequestRecord]] = defaultdict(list)
    for record in records:
        clients[record.client].append(record)
    if len(clients) < 2 or not num_windows:
        return None
    service = np.zeros((len(clients), num_windows))
    active, backlogged = np.zeros_like(service, dtype=bool), np.zeros_like(service, dtype=bool)
    for place, own in enumerate(clients.values()):
        for record in own:
            until = end if record.finished_at is None else record.finished_at
            active[place, floor(record.sent_at / WINDOW_SECONDS) : ceil(until / WINDOW_SECONDS)] = True
            if times := record.token_times:
                windows = np.minimum(np.array(times) // WINDOW_SECONDS, num_windows - 1).astype(int)
                np.add.at(service[place], windows, OUTPUT_WEIGHT * record.num_output_tokens / len(times))
                service[place, windows[0]] += PROMPT_WEIGHT * record.num_prompt_tokens
        for start, until in _waits(own, end):
            backlogged[place, ceil(start / WINDOW_SECONDS) : floor(until / WINDOW_SECONDS)] = True
    most = service.max(axis=0)
    shares = np.divide(service, most, out=np.ones_like(service), where=backlogged & (most > 0))
    contested = np.flatnonzero(active.sum(axis=0) >= 2)
    indices = [jain(shares[active[:, window], window].tolist()) for window in contested]
    return float(np.mean(indices)) if indices else None


def _waits(records: Iterable[RequestRecord], end: float) -> list[tuple[float, float]]:
    """When some request waited for its first token: intervals that do not touch each other."""
    merged: list[tuple[float, float]] = []
    for start, until in sorted(
        (r.sent_at, r.token_times[0] if r.token_times else r.finished_at or end) for r in records
    ):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], until))
        else:
            merged.append((start, until))
    return merged


# -- cells -------------------------------------------------------------------------------------------------------------

BASELINES = ("static", "static-nopad")


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


def collect(runs: Iterable[Run], predictions: Iterable[Run] = (), slo: Slo = DEFAULT_SLO) -> list[Cell]:
    """Put the repetitions of each combination together, and beside them what the twin predicts.

    The steps of one run of each combination are kept, so that `runs` may be read from files one by one.

    Args:
        runs: measured, in any order; workloads, loads and setups are shown in the order of their first runs.
        predictions: simulated; those of a combination that was not measured are left out.
    """

    def combination(run: Run) -> tuple[str, Load, Setup]:
        return run.workload, replace(run.load, seed=0), run.setup  # the seed of arrivals may differ

    repetitions: defaultdict[tuple[str, Load, Setup], list[tuple[Run, Figures, list[str]]]] = defaultdict(list)
    for run in runs:
        own = repetitions[combination(run)]
        own.append((run, summarize(run, slo), list(problems(run))))
        if len(own) > 1 and own[0][0].is_complete:
            run.steps = []  # of one run they are enough
    predicted = {combination(run): summarize(run, slo) for run in predictions}
    order = {
        (workload, load, setup): None
        for workload, load in dict.fromkeys((workload, load) for workload, load, _ in repetitions)
        for setup in dict.fromkeys(setup for _, _, setup in repetitions)
    }
    cells = []
    for workload, load, setup in filter(repetitions.__contains__, order):
        own = repetitions[workload, load, setup]
        shown = [one for one in own if one[0].is_complete] or own
        options = [other.options for name, _, other in repetitions if name == workload]
        cells.append(
            Cell(
                section=_section(workload, setup.options, options),
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


def _section(workload: str, own: tuple[str, ...], all_options: Sequence[tuple[str, ...]]) -> str:
    """The workload, and the options that distinguish these servers from others that ran it."""
    num_common = 0
    while num_common < len(own) and len({options[: num_common + 1] for options in all_options}) == 1:
        num_common += 1
    return ", ".join([workload, *([" ".join(own[num_common:])] if own[num_common:] else [])])


def problems(run: Run) -> Iterable[str]:
    """What went wrong in a run, a sentence each."""
    where = f"{run.workload}, {run.load}, {run.setup.name}, repetition {run.repetition + 1}"
    if not run.is_complete:
        yield f"{where} broke off: {sum(record.is_answered for record in run.requests)} requests had been answered."
    errors = Counter(record.error for record in run.requests if record.error is not None)
    if errors:
        (error, _), num_errors = errors.most_common(1)[0], errors.total()
        yield f"{where}: {num_errors} of {len(run.requests)} requests were not answered, most often: {error}."
    if not run.steps:
        yield f"{where}: there is no trace of the engine's steps."


def by(cells: Iterable[Cell], name: str) -> dict[Any, list[Cell]]:
    """The cells by their section or their load."""
    groups: defaultdict[Any, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[getattr(cell, name)].append(cell)
    return groups


def in_order(cells: Iterable[Cell]) -> list[tuple[Load, list[Cell]]]:
    """The cells of each load, from little to much."""
    return sorted(by(cells, "load").items(), key=lambda item: (item[0].users, item[0].rate, item[0].burstiness))


def main_cells(cells: Iterable[Cell]) -> list[Cell]:
    """The cells of the load that the pictures show: that of the most setups, of several the first."""
    return max(by(cells, "load").values(), key=len)


def baseline(cells: Iterable[Cell]) -> Cell | None:
    """The static baseline among cells of one load: with padding rows, or else without; never with speculation."""
    plain = {cell.setup.policy: cell for cell in cells if cell.setup.speculation == "off"}
    return next((plain[policy] for policy in BASELINES if policy in plain), None)


def speed_up(name: str, cell: Cell, base: Cell | None) -> float | None:
    """How many times better a figure is than the baseline's: throughput higher, or a latency lower."""
    own, other = (one.measured.median.get(name) if one else None for one in (cell, base))
    if not own or not other:
        return None
    return own / other if name == "throughput" else other / own
