"""A whole load test: preparation, profile, comparison, predictions, report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]  # it ships none

from shoal.loadtest.accuracy import compare
from shoal.loadtest.comparison import Comparison, Measure, Results
from shoal.loadtest.errors import LoadTestError
from shoal.loadtest.measuring import Measurer
from shoal.loadtest.plan import Plan, PlannedRun, interleave
from shoal.loadtest.prediction import PROFILE_WORKLOADS, ProfileRuns, predict, step_seconds
from shoal.loadtest.preparation import Facts, Key, Preparation, machine
from shoal.loadtest.profile import SERIES, Profile, read_profile, read_profiled_workload, write_profile
from shoal.loadtest.progress import Bars
from shoal.loadtest.report import write_report
from shoal.loadtest.report_data import Cell, ReportData, baseline, by_load, by_section, collect
from shoal.loadtest.storage import Storage, write_json
from shoal.loadtest.workload import WorkloadRequest, read_workload
from shoal.loadtest.workload_files import Sending, WorkloadFiles
from shoal.loadtest.workloads import WORKLOADS

PROFILE_FOLDER = "profile"
RUNS_BETWEEN = 3  # of the comparison, between two of a profile that is taken amid it


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a load test came to.

    Attributes:
        report: `report.html`.
        complaints: what must not be overlooked; empty if all went well.
    """

    cells: Sequence[Cell]
    report: Path
    complaints: Sequence[str]


def conduct(plan: Plan, folder: Path, *, options: Sequence[str], is_resumed: bool, command: str) -> Study:
    """Carry a plan out, and write its report.

    Args:
        options: of all servers.
        command: that repeats it, for the report.

    Raises:
        LoadTestError: it cannot begin; or something else than a server under test failed in the middle, and what was
            measured is in the folder.
    """
    storage = Storage(folder, plan, is_resumed=is_resumed)
    files = WorkloadFiles(storage)
    try:
        given = read_profile(Path(plan.costs)) if plan.costs else None
        facts, workloads = Preparation(plan, storage, files, options).run(() if given else PROFILE_WORKLOADS)
    except LoadTestError:
        storage.withdraw()
        raise
    profiler = _Profiler(plan, storage, facts, workloads)
    profile = given or profiler.take_first()
    measure = Measurer(model=plan.model, storage=storage).measure
    with Bars(plan.num_requests) as bars:
        again = profiler.amid(measure) if plan.profile_again else measure
        results = Comparison(plan, storage, again, files.sending, bars).run()
    if plan.profile_again:
        profile = profiler.take_rest()
    predictions, reasons = predict(results.runs, files.sending, profile)
    reasons = [*profiler.failures, *reasons]
    cells = collect((storage.load(run) for run in results.runs.values()), predictions, plan.slo)
    report = ReportData(
        title="Load test of Shoal",
        made_at=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=command,
        machine=machine(),
        model=facts.model,
        slo=plan.slo,
        cells=cells,
        differing_texts=results.same_work.differing,
        warnings=[*results.failures, *reasons],
        step_seconds=step_seconds(profile.costs),
    )
    write_json(folder / "summary.json", _summary(report, results))
    write_report(folder, report)
    return Study(cells=cells, report=folder / "report.html", complaints=results.complaints)


def profile_servers(folder: Path, plan: Plan, *, options: Sequence[str]) -> Profile:
    """Take a profile, and save it with all workloads in the tokens of the model.

    Args:
        plan: model, seed and number of requests.

    Raises:
        LoadTestError: a server failed, or too little was measured.
    """
    keys = {name: (name, plan.num_requests, plan.seed) for name in WORKLOADS}
    with tempfile.TemporaryDirectory() as temporary:
        storage = Storage(Path(temporary), plan)
        preparation = Preparation(plan, storage, WorkloadFiles(storage), options)
        facts, workloads = preparation.run([*PROFILE_WORKLOADS, *keys.values()])
        runs = ProfileRuns(facts, workloads, storage, Measurer(model=plan.model, storage=storage))
        _take_series(runs)
        profile = runs.profile(machine())
    write_profile(folder, profile, {name: workloads[key] for name, key in keys.items()})
    return profile


def rehearse(plan: Plan, costs: Path) -> list[Cell]:
    """Simulate a plan.

    Args:
        costs: folder of a profile.

    Raises:
        LoadTestError: there is no such profile, it lacks a workload, or a run cannot be simulated.
    """
    profile = read_profile(costs)
    with tempfile.TemporaryDirectory() as temporary:
        storage = Storage(Path(temporary), plan)
        files = WorkloadFiles(storage)
        for name in files.missing(plan.workloads):
            replayed = read_workload(Path(plan.replay)) if plan.replay else None
            files.copy(name, replayed or read_profiled_workload(costs, name, plan.num_requests))
        planned = interleave(plan.experiments, lambda experiment: experiment.loads)
        runs, reasons = predict(planned, files.sending, profile)
    if reasons:
        raise LoadTestError("; ".join(reasons))
    return collect(runs, (), plan.slo)


class _Profiler:
    """Takes the profile of a load test: the series before the comparison, and perhaps further runs of it amid.

    Args:
        storage: of the load test; the profile has a folder in its.
        workloads: those of `PROFILE_WORKLOADS`.

    Attributes:
        failures: what went wrong amid the comparison, in words.
    """

    def __init__(
        self, plan: Plan, storage: Storage, facts: Facts, workloads: Mapping[Key, Sequence[WorkloadRequest]]
    ) -> None:
        self.failures: list[str] = []
        self._plan, self._storage = plan, storage
        self._folder = storage.folder / PROFILE_FOLDER
        own = Storage(self._folder, plan, is_resumed=True)
        self._runs = ProfileRuns(facts, workloads, own, Measurer(model=plan.model, storage=own))
        self._num_measured = 0

    def take_first(self) -> Profile:
        """Run the series, and save what follows from it.

        Raises:
            LoadTestError: a server failed, or too little was measured.
        """
        _take_series(self._runs)
        return self._save()

    def amid(self, measure: Measure) -> Measure:
        """Measures as `measure` does, and between every few measurements a run of the series."""

        def measure_and_profile(planned: PlannedRun, sending: Sending, observe: Callable[[int], None]) -> Path:
            self._num_measured += 1
            if self._num_measured % RUNS_BETWEEN == 0 and not self.failures:
                try:
                    self._runs.take()
                except LoadTestError as error:
                    self.failures.append(f"Predictions are those of a profile that broke off: {error}")
            return measure(planned, sending, observe)

        return measure_and_profile

    def take_rest(self) -> Profile:
        """Complete the series that was begun last, and save what follows from all."""
        try:
            if not self.failures:
                _take_series(self._runs)
        except LoadTestError as error:
            self.failures.append(f"Predictions are those of a profile that broke off: {error}")
        return self._save()

    def _save(self) -> Profile:
        profile = self._runs.profile(machine())
        names = dict.fromkeys(name.partition(":")[0] for name in self._plan.workloads)
        saved = {name: read_workload(self._storage.workload_file(name)) for name in names}
        write_profile(self._folder, profile, saved)
        return profile


def _take_series(runs: ProfileRuns) -> None:
    """Complete the series that was begun; begin with a whole one."""
    num_left = -len(runs.taken) % len(SERIES) if runs.taken else len(SERIES)
    for _ in tqdm(range(num_left), unit="run", desc="profile"):
        runs.take()


def figures(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The most important figures of each cell, for a program that reads along."""
    return [
        {
            "workload": cell.workload,
            "load": cell.load,
            "setup": cell.setup.name,
            "throughput": cell.measured.median.throughput,
            "goodput": cell.measured.median.goodput,
            "ttft": cell.measured.median.ttft,
            "e2e": cell.measured.median.e2e,
            "x_static": _speed_up(cell, cells),
        }
        for cell in cells
    ]


def _summary(report: ReportData, results: Results) -> dict[str, Any]:
    return {
        "made_at": report.made_at,
        "command": report.command,
        "machine": dict(report.machine),
        "model": report.model,
        "slo": report.slo,
        "complaints": results.complaints,
        "differing_texts": results.same_work.differing,
        "cells": [
            {
                "section": cell.section,
                "workload": cell.workload,
                "load": cell.load,
                "setup": cell.setup,
                "x_static": _speed_up(cell, report.cells),
                "measured": cell.measured,
                "predicted": cell.predicted,
                "accuracy": _accuracy(cell),
                "problems": cell.problems,
            }
            for cell in report.cells
        ],
    }


def _accuracy(cell: Cell) -> list[dict[str, Any]]:
    if cell.predicted is None:
        return []
    return [
        {"name": figure.name, "predicted": figure.predicted, "measured": figure.measured, "error": figure.error}
        for figure in compare(cell.predicted, cell.measured.median)
    ]


def _speed_up(cell: Cell, cells: Sequence[Cell]) -> float | None:
    """Throughput over the static baseline's of the same workload and load."""
    static = baseline(by_load(by_section(cells)[cell.section])[cell.load])
    base = static.measured.median.throughput if static else 0.0
    return cell.measured.median.throughput / base if base else None
