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
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from tqdm import tqdm  # type: ignore[import-untyped]  # it has no types

from shoal.clients import ClientError, ShoalClient
from shoal.loadtest.arrivals import open_arrivals
from shoal.loadtest.costs import fit
from shoal.loadtest.measure import RUN_FILE, TOOLS, Sent, Tools, load_run, measure, server_options
from shoal.loadtest.metrics import Cell, baseline, by, collect, problems, speed_up, summarize
from shoal.loadtest.plan import Experiment, Plan, PlannedRun, interleave, slug
from shoal.loadtest.profile import Profile, predict, read_profile, series, write_profile
from shoal.loadtest.records import Load, LoadTestError, Run, ServerDiedError, Setup, read_json, write_json
from shoal.loadtest.report import Report, write_report
from shoal.loadtest.server import ServerProcess
from shoal.loadtest.twin import compare, simulate, step_seconds
from shoal.loadtest.workload import WorkloadRequest, make_workload, read_workload, write_workload
from shoal.scheduler.errors import ShoalError

PLAN_FILE, PROFILE_FOLDER = "plan.json", "profile"
RUNS_BETWEEN = 3  # of the comparison, between two of a profile that is taken amid it
MAX_NAMED = 10  # requests in a complaint

Workloads = dict[str, list[WorkloadRequest]]  # by name


class Runs:
    """A folder of runs, which measures those that it does not have.

    Attributes:
        bar: a progress bar that is told how many requests have ended; None is none.
    """

    def __init__(self, folder: Path, model: str, tools: Tools = TOOLS) -> None:
        self.bar: Any = None
        self._folder, self._model, self._tools = folder, model, tools
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, planned: PlannedRun, *, is_complete: bool = True) -> Path | None:
        """The folder of a run that was saved, complete or broken off."""
        for folder in self._folders(planned):
            if (folder / RUN_FILE).exists() and read_json(folder / RUN_FILE, Run).is_complete == is_complete:
                return folder
        return None

    def measure(self, planned: PlannedRun, sent: Sent) -> Path:
        """The folder of a run, which is measured unless it is there; raises as `measure` does."""
        if found := self.find(planned):
            return found
        for broken_off in self._folders(planned):
            shutil.rmtree(broken_off)
        numbers = [int(path.name.partition("-")[0]) for path in self._folder.iterdir()]
        folder = self._folder / f"{max(numbers, default=0) + 1:03}-{planned.name}"
        folder.mkdir()
        measure(planned, self._model, sent, folder, observe=self._observe, tools=self._tools)
        return folder

    def _observe(self, num_requests: int) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"{num_requests} requests")

    def _folders(self, planned: PlannedRun) -> list[Path]:
        return [folder for folder in self._folder.iterdir() if folder.name.partition("-")[2] == planned.name]


class ProfileRuns:
    """The runs of a profile in its folder: its series again and again, as far as they are asked for.

    Args:
        plan: a small comparison has a short series; a plan without experiments has the whole one.

    Attributes:
        workloads: files and their makings, for `prepare`.
        failure: what went wrong amid the comparison; empty if nothing did.
    """

    def __init__(self, folder: Path, plan: Plan, tools: Tools = TOOLS) -> None:
        self.failure = ""
        self._folder, self._options = folder, plan.options
        policies = {setup.policy for experiment in plan.experiments for setup in experiment.setups}
        loads = [load for experiment in plan.experiments for load in experiment.loads]
        num_requests = plan.num_requests if plan.experiments else None
        self._stretches = series(num_requests, plan.options, policies=policies, loads=loads)
        self._is_short = self._stretches != series(None, plan.options)
        by_size = sorted(self._stretches, key=lambda stretch: stretch.num_requests)
        self.workloads = {
            self._file(stretch.workload): (stretch.workload, stretch.num_requests, 0) for stretch in by_size
        }
        self._runs = Runs(folder / "runs", plan.model, tools)
        self._taken: list[Run] = []

    def take(self) -> None:
        """Measure the next run; raises as `measure` does."""
        number = len(self._taken)
        stretch = self._stretches[number % len(self._stretches)]
        planned = PlannedRun(setup=stretch.setup, workload=f"profile-{number + 1}", load=stretch.load)
        requests = read_workload(self._file(stretch.workload))[: stretch.num_requests]
        self._taken.append(load_run(self._runs.measure(planned, Sent(requests, stretch.load))))

    def take_series(self) -> None:
        """Measure a first series, or complete the one that was begun."""
        num_left = -len(self._taken) % len(self._stretches) if self._taken else len(self._stretches)
        for _ in tqdm(range(num_left), unit="run", desc="profile"):
            self.take()

    def try_to(self, take: Callable[[], None]) -> None:
        """Take further runs, until one fails: the comparison does not need them."""
        try:
            if not self.failure:
                take()
        except LoadTestError as error:
            self.failure = f"Predictions are those of a profile that broke off: {error}"

    def save(self) -> Profile:
        """What follows from all that were taken; raises LoadTestError if they are too few."""
        profile = Profile(
            server=self._taken[0].server,
            options=self._options,
            versions=machine(),
            costs=fit(self._taken),
            is_short=self._is_short,
        )
        write_profile(self._folder, profile)
        return profile

    def _file(self, name: str) -> Path:
        return self._folder / f"series-{name}.jsonl"


class Comparison:
    """All runs of a plan, and what they came to.

    A server that does not start is not tried again: further runs of its setup are left out.  A server that dies in the
    middle costs this run only, and so does a load generator that fails.  The comparison goes on with the next run.

    Attributes:
        runs: the folders of what was measured, in this order; runs that broke off too.
        failures, incomplete: in words, what could not be run, and what is missing of runs or differs among them.
        differing: by workload, the requests whose answers were not the same in all runs.
    """

    def __init__(self, plan: Plan, runs: Runs, workloads: Workloads) -> None:
        self.runs: dict[PlannedRun, Path] = {}
        self.failures: list[str] = []
        self.incomplete: list[str] = []
        self.differing: defaultdict[str, dict[str, None]] = defaultdict(dict)
        self._plan, self._runs, self._workloads = plan, runs, workloads
        self._given_up: set[Setup] = set()
        self._answers: dict[tuple[str, str], tuple[int, str]] = {}
        self._request_rates: defaultdict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(list)

    def run(self, between: Callable[[], None] = lambda: None) -> None:
        """Measure all that is not yet in the folder.

        Args:
            between: is called after every few runs.
        """
        for loads_of in (lambda experiment: experiment.loads, self._loads_by_share):
            planned_runs = list(interleave(self._plan.experiments, loads_of))
            with tqdm(planned_runs, unit="run", desc="comparison", disable=not planned_runs) as self._runs.bar:
                for number, planned in enumerate(self._runs.bar, 1):
                    if folder := self._folder(planned):
                        self.runs[planned] = folder
                        self._check(planned, load_run(folder, with_steps=False))
                    if number % RUNS_BETWEEN == 0:
                        between()

    def _folder(self, planned: PlannedRun) -> Path | None:
        """The folder of what was measured, if anything was."""
        if planned.setup in self._given_up:
            return self._runs.find(planned)
        try:
            return self._runs.measure(planned, sending(planned, self._workloads))
        except LoadTestError as error:
            folder = self._runs.find(planned, is_complete=False)
            self.failures.append(
                f"{planned}: {error}" + ("" if folder else "; further runs of this setup are left out")
            )
            if folder is None:
                self._given_up.add(planned.setup)
            return folder

    def _check(self, planned: PlannedRun, run: Run) -> None:
        """Compare the answers, request by request, with those of the first run of the workload."""
        found = []
        for record in filter(lambda record: record.is_answered, run.requests):
            answer = record.num_output_tokens, record.text_hash
            if self._answers.setdefault((run.workload, record.request_id), answer) != answer:
                found.append(record.request_id)
        if found:
            self.differing[run.workload].update(dict.fromkeys(found))
            named = ", ".join(found[:MAX_NAMED]) + (" and more" if len(found) > MAX_NAMED else "")
            self.incomplete.append(
                f"{planned}: {len(found)} answers differ from those of the first run of {run.workload}: {named}"
            )
        if not run.is_complete:
            self.incomplete += problems(load_run(self.runs[planned]))
        elif planned.load.users:
            rate = summarize(run, self._plan.slo)["request rate"]
            self._request_rates[planned.workload, planned.setup.options].append(rate)

    def _loads_by_share(self, experiment: Experiment) -> list[Load]:
        """The open loops of an experiment; none if no closed loop of its workload could be measured.

        The share of one client's requests is of the whole workload's rate.
        """
        whole = experiment.workload.partition(":")[0]
        rates = self._request_rates[whole, experiment.setups[0].options]
        if experiment.shares and not rates:
            self.failures.append(f"{experiment.workload}: no closed loop was measured, so there are no open loops")
            return []
        # Three digits, so that a name shows all of a rate.
        shares = [float(f"{share * max(rates):.3g}") for share in experiment.shares]
        return [Load(rate=rate, seed=self._plan.seed) for rate in dict.fromkeys(shares)]


def sending(planned: PlannedRun, workloads: Workloads) -> Sent:
    """What is sent for a run: the workload or, for "NAME:CLIENT", one client's requests alone.

    In an open loop these are sent when they are due in the whole workload.

    Raises:
        LoadTestError: the workload has no such client.
    """
    name, _, client = planned.workload.partition(":")
    requests, load = workloads[name], planned.load
    if not client:
        return Sent(requests, load)
    if load.rate:
        requests = [replace(request, arrival_time=due) for due, request in open_arrivals(load, requests)]
    own = [request for request in requests if request.client == client]
    if not own:
        clients = ", ".join(sorted({request.client for request in requests}))
        raise LoadTestError(f"workload {planned.workload}: there is no client {client!r}; clients are {clients}")
    return Sent(own, replace(load, rate=0.0))


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
    if plan.replay:
        write_workload(workload_file(folder, plan.workloads[0]), read_workload(Path(plan.replay)))
    files = {name: workload_file(folder, name) for name in plan.workloads}
    prepare(
        plan,
        {file: (name, plan.num_requests, plan.seed) for name, file in files.items()}
        | ({} if given else profiling.workloads),
    )
    write_json(folder / PLAN_FILE, plan)
    workloads = {name: read_workload(file) for name, file in files.items()}
    if not given:
        profiling.take_series()
    comparison = Comparison(plan, Runs(folder / "runs", plan.model), workloads)
    comparison.run((lambda: profiling.try_to(profiling.take)) if plan.profile_again else lambda: None)
    if plan.profile_again:
        profiling.try_to(profiling.take_series)
    profile = given or profiling.save()
    for file in () if given else files.values():
        shutil.copy(file, folder / PROFILE_FOLDER)
    predictions, reasons = _predictions(comparison.runs, workloads, profile)
    report = Report(
        made_at=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=plan.command,
        machine=machine(),
        model=profile.server.model,
        slo=plan.slo,
        cells=collect(map(load_run, comparison.runs.values()), predictions, plan.slo),
        differing={name: list(found) for name, found in comparison.differing.items()},
        complaints=comparison.failures + comparison.incomplete,
        warnings=[*comparison.failures, *filter(None, [profiling.failure]), *reasons],
        step_seconds=step_seconds(profile.costs),
    )
    about = {name: getattr(report, name) for name in ("made_at", "command", "machine", "model", "slo", "complaints")}
    write_json(folder / "summary.json", about | {"cells": summaries(report.cells)})
    write_report(folder, report)
    return report


def take_profile(plan: Plan, folder: Path) -> None:
    """Take a profile, and save it with the plan's workloads in the tokens of the model.

    Raises:
        LoadTestError: a server failed, or too little was measured.
    """
    _clear(folder)
    profiling = ProfileRuns(folder, replace(plan, experiments=()))
    files = {workload_file(folder, name): (name, plan.num_requests, plan.seed) for name in plan.workloads}
    prepare(plan, files | profiling.workloads)
    profiling.take_series()
    profiling.save()


def rehearse(plan: Plan, costs: Path) -> list[Cell]:
    """Simulate a plan.

    Args:
        costs: folder of a profile.

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


def prepare(plan: Plan, workloads: dict[Path, tuple[str, int, int]]) -> None:
    """Make the workloads that are not there yet, with the tokenizer of one server.

    Args:
        workloads: name, number of requests and seed by file.

    Raises:
        ServerDiedError: the server does not start or does not answer.
        LoadTestError: a workload is unknown, or does not fit the model.
    """
    missing = {file: making for file, making in workloads.items() if not file.exists()}
    if not missing:
        return
    options = server_options(plan.model, Setup(policy="fcfs", options=plan.options))
    log = next(iter(missing)).with_name("preparation.log")
    with ServerProcess(options, log) as server, ShoalClient(server.url) as client:
        max_model_len = server.info().limits.max_model_len
        try:
            for file, making in missing.items():
                made = make_workload(*making, lambda text: list(client.tokenize(text).token_ids), max_model_len)
                write_workload(file, made)
        except ClientError as error:
            server.check()
            raise ServerDiedError(f"the server did not answer while workloads were made: {error}") from error


def _predictions(
    runs: dict[PlannedRun, Path], workloads: Workloads, profile: Profile
) -> tuple[list[Run], Iterable[str]]:
    """What the twin says of each combination, and why it says nothing of others."""
    found: list[Run] = []
    reasons: dict[str, None] = {}
    for planned, folder in {replace(planned, repetition=0): folder for planned, folder in runs.items()}.items():
        try:
            found.append(predict(profile, load_run(folder, with_steps=False), *sending(planned, workloads)))
        except (LoadTestError, ShoalError) as error:
            reasons[f"{planned.setup.name} was not simulated: {error}"] = None
    return found, reasons


def summaries(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """All figures of each cell, for a program that reads along."""
    found = []
    for cell in cells:
        base = baseline(by(by(cells, "section")[cell.section], "load")[cell.load])
        names = ("section", "workload", "load", "setup", "measured", "predicted", "problems")
        errors = (
            {error.name: error.error for error in compare(cell.predicted, cell.measured.median)}
            if cell.predicted
            else {}
        )
        found.append(
            {name: getattr(cell, name) for name in names}
            | {"errors": errors, "x_static": speed_up("throughput", cell, base)}
        )
    return found


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
