"""A whole load test, in a folder in which everything is saved as soon as it is known.

plan.json                 what is compared; an interrupted comparison goes on from it
workload-NAME.jsonl       what is asked
profile/                  the twin's profile: profile.json, its own workloads and runs
runs/NNN-NAME/            a run, as `loadtest/measure.py` saves it
summary.json              all figures
report.html, pictures/    the report
"""

from __future__ import annotations

import os
import platform
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from tqdm import tqdm  # type: ignore[import-untyped]  # it has no types

from shoal.clients import ShoalClient
from shoal.loadtest.arrivals import open_arrivals
from shoal.loadtest.costs import fit
from shoal.loadtest.measure import REQUESTS_FILE, RUN_FILE, Sent, find_run, load_run, measure, server_options
from shoal.loadtest.metrics import Cell, baseline, by, collect, speed_up, summarize
from shoal.loadtest.plan import Experiment, Plan, interleave
from shoal.loadtest.profile import Profile, predict, read_profile, series, write_profile
from shoal.loadtest.records import Load, LoadTestError, PlannedRun, Run, Setup, read_json, slug, write_json
from shoal.loadtest.report import Report, write_report
from shoal.loadtest.server import ServerProcess
from shoal.loadtest.traffic import read_results
from shoal.loadtest.twin import compare, simulate, step_seconds
from shoal.loadtest.workload import WORKLOADS, WorkloadRequest, make_workload, read_workload, write_workload
from shoal.scheduler.errors import ShoalError

PLAN_FILE, PROFILE_FOLDER = "plan.json", "profile"
RUNS_BETWEEN = 3  # of the comparison, between two of a profile that is taken amid it
MAX_NAMED = 10  # requests in a complaint, the first of them

Workloads = dict[str, list[WorkloadRequest]]  # by name


def compare_all(
    plan: Plan, folder: Path, workloads: Workloads, between: Callable[[], None] = lambda: None
) -> tuple[dict[PlannedRun, Path], list[str]]:
    """Measure all runs of a plan, each in its folder unless it is there.

    A server that does not start is not tried again: further runs of its setup are left out.  A server that dies in the
    middle costs this run only, and so does a load generator that fails.  The comparison goes on with the next run.

    Args:
        between: is called after every few runs.

    Returns:
        The folders of what was measured, in this order, runs that broke off too; and in words, what could not be run.
    """
    runs: dict[PlannedRun, Path] = {}
    failures: list[str] = []
    given_up: set[Setup] = set()

    def planned_runs() -> Iterator[PlannedRun]:
        yield from interleave(plan.experiments, lambda experiment: experiment.loads)
        yield from interleave(plan.experiments, lambda experiment: _loads_by_share(experiment, plan, runs, failures))

    total = sum(len(one.setups) * len(one.loads + one.shares) * one.repetitions for one in plan.experiments)
    with tqdm(planned_runs(), total=total, unit="run", desc="comparison") as bar:
        for number, planned in enumerate(bar, 1):
            try:
                if planned.setup not in given_up:
                    sent = sending(planned, workloads)
                    measure(planned, plan.model, sent, folder, lambda num: bar.set_postfix_str(f"{num} requests"))
            except LoadTestError as error:
                failures.append(f"{planned}: {error}")
                if not find_run(folder, planned):
                    failures[-1] += "; further runs of this setup are left out"
                    given_up.add(planned.setup)
            if found := find_run(folder, planned):
                runs[planned] = found
            if number % RUNS_BETWEEN == 0:
                between()
    return runs, failures


def _loads_by_share(
    experiment: Experiment, plan: Plan, runs: Mapping[PlannedRun, Path], failures: list[str]
) -> list[Load]:
    """The open loops of an experiment; none, and a failure, if no closed loop of the whole workload was measured."""
    whole, options = experiment.workload.partition(":")[0], experiment.setups[0].options
    closed = [
        load_run(folder, with_steps=False)
        for planned, folder in runs.items()
        if experiment.shares and planned.load.users and (planned.workload, planned.setup.options) == (whole, options)
    ]
    rates = [summarize(run, plan.slo)["request rate"] for run in closed if run.is_complete]
    if experiment.shares and not rates:
        failures.append(f"{experiment.workload}: no closed loop was measured, so there are no open loops")
        return []
    # Three digits, so that a name shows all of a rate.
    shares = [float(f"{share * max(rates):.3g}") for share in experiment.shares]
    return [Load(rate=rate, seed=plan.seed) for rate in dict.fromkeys(shares)]


def sending(planned: PlannedRun, workloads: Workloads) -> Sent:
    """What is sent for a run: the workload or, for "NAME:CLIENT", one client's requests, due as in the whole workload.

    Raises:
        LoadTestError: the workload has no such client.
    """
    name, _, client = planned.workload.partition(":")
    requests, load = workloads[name], planned.load
    if load.rate:
        requests = [replace(request, arrival_time=due) for due, request in open_arrivals(load, requests)]
        load = replace(load, rate=0.0)
    own = [request for request in requests if client in ("", request.client)]
    if not own:
        clients = ", ".join(sorted({request.client for request in requests}))
        raise LoadTestError(f"workload {planned.workload}: there is no client {client!r}; clients are {clients}")
    return own, load


def differing_answers(runs: Mapping[PlannedRun, Path]) -> dict[PlannedRun, list[str]]:
    """By run, the requests whose answers are not those of the first run of the same workload."""
    first: dict[tuple[str, str], tuple[int, str]] = {}
    found: defaultdict[PlannedRun, list[str]] = defaultdict(list)
    for planned, folder in runs.items():
        for record in read_results(folder / REQUESTS_FILE).records:
            answer = record.num_output_tokens, record.text_hash
            if record.is_answered and first.setdefault((planned.workload, record.request_id), answer) != answer:
                found[planned].append(record.request_id)
    return found


# -- the profile -------------------------------------------------------------------------------------------------------


class ProfileRuns:
    """The runs of a profile in its folder: a series again and again, as far as they are asked for.

    Args:
        plan: a small comparison has a short series; a plan without experiments has the whole one.

    Attributes:
        workloads: files and their makings, for `prepare`.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        policies = {setup.policy for experiment in plan.experiments for setup in experiment.setups}
        loads = [load for experiment in plan.experiments for load in experiment.loads]
        num_requests = plan.num_requests if plan.experiments else None
        self._folder, self._plan = folder, plan
        self._series = series(num_requests, plan.options, policies=policies, loads=loads)
        by_size = sorted(self._series, key=lambda stretch: stretch.num_requests)
        self.workloads = {self._file(one.workload): (one.workload, one.num_requests, 0) for one in by_size}
        self._to_come, self._taken = self._measure(), list[Run]()

    def take(self, num_runs: int) -> None:
        """Measure the next runs, but none after one that failed; raises as `measure` does."""
        self._taken.extend(islice(self._to_come, num_runs))

    def take_series(self) -> None:
        """Measure a first series, or complete the one that was begun; raises as `measure` does."""
        num_left = -len(self._taken) % len(self._series) if self._taken else len(self._series)
        for _ in tqdm(range(num_left), unit="run", desc="profile"):
            self.take(1)

    def save(self) -> Profile:
        """What follows from all that were taken; raises LoadTestError if they are too few."""
        is_short = self._series != series(None, self._plan.options)
        about: dict[str, Any] = {"options": self._plan.options, "versions": machine(), "is_short": is_short}
        profile = Profile(server=self._taken[0].server, costs=fit(self._taken), **about)
        write_profile(self._folder, profile)
        return profile

    def _measure(self) -> Iterator[Run]:
        for number, stretch in enumerate(cycle(self._series), 1):
            planned = PlannedRun(setup=stretch.setup, workload=f"profile-{number}", load=stretch.load)
            sent = read_workload(self._file(stretch.workload))[: stretch.num_requests], stretch.load
            yield load_run(measure(planned, self._plan.model, sent, self._folder / "runs"))

    def _file(self, name: str) -> Path:
        return self._folder / f"series-{name}.jsonl"


# -- the commands ------------------------------------------------------------------------------------------------------


def open_folder(folder: Path, plan: Plan | None) -> Plan:
    """The plan of a comparison in this folder: a new one, or (None) the one that it holds.

    Raises:
        LoadTestError: the folder holds a comparison already, or none to go on with.
    """
    file = folder / PLAN_FILE
    if plan is None:
        return read_json(file, Plan)
    if file.exists():
        raise LoadTestError(f"{folder} holds a comparison already; go on with --resume, or choose another --output")
    _clear(folder)
    return plan


def conduct(plan: Plan, folder: Path) -> Report:
    """Carry a plan out, as far as the folder does not hold it, and write its report.

    Raises:
        LoadTestError: it cannot begin; or something other than a server under test failed in the middle, and what was
            measured is in the folder.
    """
    given = read_profile(Path(plan.costs)) if plan.costs else None
    profiling = ProfileRuns(folder / PROFILE_FOLDER, plan)
    files = {name: workload_file(folder, name) for name in plan.workloads}
    if plan.replay and not (folder / PLAN_FILE).exists():
        shutil.copy(plan.replay, *files.values())
    makings = {file: (name, plan.num_requests, plan.seed) for name, file in files.items()}
    prepare(plan, makings if given else makings | profiling.workloads)
    write_json(folder / PLAN_FILE, plan)
    workloads = {name: read_workload(file) for name, file in files.items()}
    warnings: list[str] = []

    def again(take: Callable[[], None]) -> None:
        """Take further runs of the profile, which the comparison does not need."""
        try:
            if plan.profile_again:
                take()
        except LoadTestError as error:
            warnings.append(f"Predictions are those of a profile that broke off: {error}")

    if not given:
        profiling.take_series()
    runs, failures = compare_all(plan, folder / "runs", workloads, lambda: again(partial(profiling.take, 1)))
    again(profiling.take_series)
    profile = given or profiling.save()
    for file in () if given else files.values():
        shutil.copy(file, folder / PROFILE_FOLDER)
    predictions, reasons = _predictions(runs, workloads, profile)
    cells = collect(map(load_run, runs.values()), predictions, plan.slo)
    differing: defaultdict[str, dict[str, None]] = defaultdict(dict)
    complaints = [*failures, *(problem for cell in cells for problem in cell.problems)]
    for planned, found in differing_answers(runs).items():
        differing[planned.workload] |= dict.fromkeys(found)
        named = ", ".join(found[:MAX_NAMED])
        complaints.append(f"{planned}: {len(found)} answers differ from the first run's of the workload: {named}")
    report = Report(
        made_at=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=plan.command,
        machine=machine(),
        model=profile.server.model,
        slo=plan.slo,
        cells=cells,
        differing={name: list(requests) for name, requests in differing.items()},
        complaints=complaints,
        warnings=[*failures, *warnings, *profile.warnings, *reasons],
        step_seconds=step_seconds(profile.costs),
    )
    about = {name: getattr(report, name) for name in ("made_at", "command", "machine", "model", "slo", "complaints")}
    write_json(folder / "summary.json", about | {"cells": summaries(cells)})
    write_report(folder, report)
    return report


def take_profile(plan: Plan, folder: Path) -> None:
    """Take a profile, and save it with all workloads in the tokens of the model; the plan has no experiments.

    Raises:
        LoadTestError: a server failed, or too little was measured.
    """
    _clear(folder)
    profiling = ProfileRuns(folder, plan)
    files = {workload_file(folder, name): (name, plan.num_requests, plan.seed) for name in WORKLOADS}
    prepare(plan, files | profiling.workloads)
    profiling.take_series()
    profiling.save()


def rehearse(plan: Plan, costs: Path) -> list[Cell]:
    """Simulate a plan with the profile in the folder `costs`.

    Raises:
        LoadTestError: there is no such profile, it lacks a workload, or a run cannot be simulated.
    """
    profile = read_profile(costs)
    workloads = {}
    for name in plan.workloads:
        requests = read_workload(Path(plan.replay) if plan.replay else workload_file(costs, name))
        if len(requests) < plan.num_requests:
            raise LoadTestError(f"workload {name}: {len(requests)} requests were saved, fewer than {plan.num_requests}")
        workloads[name] = requests[: plan.num_requests]
    runs = []
    for planned in interleave(plan.experiments, lambda experiment: experiment.loads):
        server = profile.server_with(planned.setup.options)
        sent = sending(planned, workloads)
        run = simulate(*sent, planned.setup, server=server, costs=profile.costs, workload=planned.workload)
        runs.append(replace(run, load=planned.load))
    return collect(runs, (), plan.slo)


def workload_file(folder: Path, name: str) -> Path:
    return folder / f"workload-{slug(name)}.jsonl"


def _clear(folder: Path) -> None:
    """Remove what an attempt has left that did not come to its first run."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in ("runs", PROFILE_FOLDER):
        shutil.rmtree(folder / old, ignore_errors=True)
    for file in folder.glob("*-*.jsonl"):
        file.unlink()


def prepare(plan: Plan, workloads: Mapping[Path, tuple[str, int, int]]) -> None:
    """Make the workloads that are not there yet, with the tokenizer of one server.

    Args:
        workloads: name, number of requests and seed by file.

    Raises:
        LoadTestError: the server does not start or does not answer, or a workload does not fit the model.
    """
    missing = {file: making for file, making in workloads.items() if not file.exists()}
    for file in missing:
        file.parent.mkdir(parents=True, exist_ok=True)
    if missing:
        options = server_options(plan.model, Setup(policy="fcfs", options=plan.options))
        log = next(iter(missing)).with_name("preparation.log")
        with ServerProcess(options, log) as server, server.answering(), ShoalClient(server.url) as client:
            max_model_len = server.info().limits.max_model_len
            for file, making in missing.items():
                made = make_workload(*making, lambda text: list(client.tokenize(text).token_ids), max_model_len)
                write_workload(file, made)


def _predictions(
    runs: Mapping[PlannedRun, Path], workloads: Workloads, profile: Profile
) -> tuple[list[Run], Sequence[str]]:
    """What the twin says of each combination, and why it says nothing of others."""
    found: list[Run] = []
    reasons: dict[str, None] = {}
    for planned, folder in {replace(planned, repetition=0): folder for planned, folder in runs.items()}.items():
        try:
            found.append(predict(profile, read_json(folder / RUN_FILE, Run), *sending(planned, workloads)))
        except (LoadTestError, ShoalError) as error:
            reasons[f"{planned.setup.name} was not simulated: {error}"] = None
    return found, list(reasons)


def summaries(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """All figures of each cell, for a program that reads along."""
    names = ("section", "workload", "load", "setup", "measured", "predicted", "problems")
    return [
        {name: getattr(cell, name) for name in names}
        | {
            "errors": {error.name: error.error for error in compare(cell.predicted or {}, cell.measured.median)},
            "x_static": speed_up(
                "throughput", cell, baseline(by(by(cells, "section")[cell.section], "load")[cell.load])
            ),
        }
        for cell in cells
    ]


def machine() -> dict[str, str]:
    """What a comparison runs on, for people."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError, IndexError):
        processor = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].partition("\n")[0]
    return {
        "processor": processor,
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "system": platform.platform(terse=True),
        "Python": platform.python_version(),
        "Shoal": version("shoal"),
        "locust": version("locust"),
    }
