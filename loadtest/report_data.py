"""What a report is made of: the runs of a comparison, put together by workload, load and setup."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from shoal.loadtest.metrics import Combined, Slo, Summary, combine, is_answered, summarize
from shoal.loadtest.records import Load, Run, Setup
from shoal.loadtest.steps import Step

Key = TypeVar("Key")

SLO = Slo()

BASELINES = ("static", "static-nopad")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One setup under one load of one workload.

    Attributes:
        section: what it may be compared within: the workload, and the options of the servers where they differ.
        measured: the figures of its complete runs; of all of them where none is complete.
        run: the first of those runs, from which the pictures are made.
        predicted: the twin's figures, if it was asked.
        problems: what went wrong in its runs, in words.
    """

    section: str
    workload: str
    load: Load
    setup: Setup
    measured: Combined
    run: Run
    predicted: Summary | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """All that a report says.

    Attributes:
        made_at: when, for people.
        command: the line that makes the same comparison again.
        machine: what it ran on, name by value: processor, cores, versions.
        model: name of the model that was served.
        slo: what goodput counts.
        cells: in the order in which they are shown; `collect` makes them.
        differing_texts: by workload, the requests whose text was not the same in all runs.
        warnings: further things that a reader must know before believing the figures.
        step_seconds: what the twin's cost model says that a step takes.
    """

    title: str
    made_at: str
    command: str
    machine: Mapping[str, str]
    model: str
    slo: Slo
    cells: Sequence[Cell]
    differing_texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    step_seconds: Callable[[Step], float] | None = None

    @property
    def sections(self) -> dict[str, list[Cell]]:
        """The cells that are compared with each other."""
        return by_section(self.cells)


def collect(runs: Iterable[Run], predictions: Iterable[Run] = (), slo: Slo = SLO) -> list[Cell]:
    """Put the repetitions of each combination together, and beside them what the twin predicts for it.

    Of each combination one run is kept and of the others their figures only, so that `runs` may be read from files one
    by one.

    Args:
        runs: measured, in any order; workloads, loads and setups are shown in the order of their first runs.
        predictions: simulated; those of a combination that was not measured are passed over.
    """
    repetitions: dict[tuple[str, Load, Setup], _Repetitions] = {}
    for run in runs:
        repetitions.setdefault(_combination(run), _Repetitions()).add(run, slo)
    predicted = {_combination(run): summarize(run, slo) for run in predictions}
    setups = list(dict.fromkeys(setup for _, _, setup in repetitions))
    loads = list(dict.fromkeys((workload, load) for workload, load, _ in repetitions))
    options = {
        name: list(dict.fromkeys(setup.options for workload, _, setup in repetitions if workload == name))
        for name, _ in loads
    }
    return [
        Cell(
            section=_section(workload, setup, options[workload]),
            workload=workload,
            load=load,
            setup=setup,
            measured=combine(group.complete or group.broken_off),
            run=group.run,
            predicted=predicted.get((workload, load, setup)),
            problems=tuple(group.problems),
        )
        for workload, load in loads
        for setup in setups
        if (group := repetitions.get((workload, load, setup)))
    ]


@dataclass(slots=True)
class _Repetitions:
    complete: list[Summary] = field(default_factory=list)
    broken_off: list[Summary] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    first: Run | None = None

    @property
    def run(self) -> Run:
        assert self.first is not None
        return self.first

    def add(self, run: Run, slo: Slo) -> None:
        if self.first is None or (run.is_complete and not self.first.is_complete):
            self.first = run
        (self.complete if run.is_complete else self.broken_off).append(summarize(run, slo))
        self.problems += problems(run)


def problems(run: Run) -> Iterator[str]:
    """What went wrong in a run, a sentence each."""
    where = f"{run.workload}, {load_name(run.load)}, {run.setup.name}, repetition {run.repetition + 1}"
    num_answered = sum(map(is_answered, run.requests))
    if not run.is_complete:
        yield f"{where} broke off: {num_answered} requests had been answered."
    errors = Counter(record.error for record in run.requests if record.error is not None)
    if errors:
        (error, _), num_errors = errors.most_common(1)[0], errors.total()
        yield f"{where}: {num_errors} of {len(run.requests)} requests were not answered, most often: {error}."
    if not run.steps:
        yield f"{where}: there is no trace of the engine's steps."


def load_name(load: Load) -> str:
    """A load in words."""
    if not load.users and not load.rate:
        return "as recorded"
    if load.users:
        words = f"{load.users} user" + "s" * (load.users > 1)
        return words + (f" who think for {load.think_seconds:g} s" if load.think_seconds else "")
    words = f"{load.rate:g} requests/s"
    return words + (f", burstiness {load.burstiness:g}" if load.burstiness != 1 else "")


def by_section(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    return _by(cells, lambda cell: cell.section)


def by_load(cells: Iterable[Cell]) -> dict[Load, list[Cell]]:
    return _by(cells, lambda cell: cell.load)


def in_order(cells: Iterable[Cell]) -> list[tuple[Load, list[Cell]]]:
    """The cells of each load, from little to much."""
    return sorted(by_load(cells).items(), key=lambda item: (item[0].users, item[0].rate, item[0].burstiness))


def main_cells(cells: Iterable[Cell]) -> list[Cell]:
    """The cells of the load that the pictures of a workload show: that of the most setups, of several the first."""
    return max(by_load(cells).values(), key=len)


def baseline(cells: Iterable[Cell]) -> Cell | None:
    """The static baseline among cells of one load: with padding rows, or else without; never with speculation."""
    plain = {cell.setup.policy: cell for cell in cells if cell.setup.speculation == "off"}
    return next((plain[policy] for policy in BASELINES if policy in plain), None)


def _combination(run: Run) -> tuple[str, Load, Setup]:
    """Repetitions may differ in the seed of their arrivals."""
    return run.workload, replace(run.load, seed=0), run.setup


def _section(workload: str, setup: Setup, all_options: Sequence[tuple[str, ...]]) -> str:
    """The workload, and what sets these servers apart from others that ran it."""
    num_common = 0
    while len({options[: num_common + 1] for options in all_options}) == 1 and num_common < len(setup.options):
        num_common += 1
    own = setup.options[num_common:]
    return ", ".join([workload, " ".join(own)]) if own else workload


def _by(cells: Iterable[Cell], key: Callable[[Cell], Key]) -> dict[Key, list[Cell]]:
    groups: dict[Key, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return groups
