"""A whole load test, in a folder in which everything is saved as soon as it is known.

plan.json                 what is compared; an interrupted comparison goes on from it
workload-NAME.jsonl       what is asked
profile/                  the twin's profile: profile.json, its workloads and runs
runs/NNN-NAME/            a run, as `loadtest/measure.py` saves it
summary.json              all figures
report.html, pictures/    the report
"""

from __future__ import annotations

import os
import platform
import shutil
from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from tqdm import tqdm  # type: ignore[import-untyped]  # it has no types

from shoal.clients import ShoalClient
from shoal.loadtest.costs import fit
from shoal.loadtest.measure import REQUESTS_FILE, RUN_FILE, load_run, measure, server_options
from shoal.loadtest.metrics import Cell, baseline, by, collect, generated, speed_up, summarize
from shoal.loadtest.plan import Plan
from shoal.loadtest.profile import FILE, SERIES, Profile, read_profile
from shoal.loadtest.recorded import read_requests
from shoal.loadtest.records import (
    GENERATE,
    LoadTestError,
    PlannedRun,
    Run,
    ServerInfo,
    Setup,
    read_json,
    slug,
    write_json,
)
from shoal.loadtest.report import Report, write_report
from shoal.loadtest.traffic import read_results
from shoal.loadtest.twin import simulate
from shoal.loadtest.workload import WORKLOADS, WorkloadRequest, make_workload, read_workload, write_workload
from shoal.scheduler.errors import ShoalError
from shoal.testing import ServerProcess

PLAN_FILE, PROFILE_FOLDER = "plan.json", "profile"
PROFILED = ("chat", "code", "agent")  # workloads of the runs of a profile

Workloads = dict[str, list[WorkloadRequest]]  # by name
Runs = dict[PlannedRun, Path]  # the folder of each

# -- the commands ------------------------------------------------------------------------------------------------------


def begin(plan: Plan, folder: Path) -> None:
    """Begin a comparison in a folder: its workloads, and last of all its plan.

    Raises:
        LoadTestError: the folder holds a comparison already, there is no such profile, or the server does not start.
    """
    if (folder / PLAN_FILE).exists():
        raise LoadTestError(f"{folder} holds a comparison already; go on with --resume, or choose another --output")
    profile_folder = folder / PROFILE_FOLDER
    names = () if plan.replay else plan.names
    if plan.costs:
        read_profile(Path(plan.costs))
        make_workloads(plan, folder, names)
    else:
        make_workloads(plan, profile_folder, [*names, *PROFILED])
        for name in names:
            shutil.copy(workload_file(profile_folder, name), folder)
    if plan.replay:
        folder.mkdir(parents=True, exist_ok=True)
        requests = read_requests(Path(plan.replay), plan.shrink)[: plan.num_requests]
        write_workload(workload_file(folder, *plan.names), requests)
    write_json(folder / PLAN_FILE, plan)


def conduct(plan: Plan, folder: Path) -> Report:
    """Carry a plan out, as far as the folder does not hold it, and write its report.

    Raises:
        LoadTestError: the profile is not there, or could not be taken.
    """
    workloads = {name: read_workload(workload_file(folder, name)) for name in plan.names}
    profile = read_profile(Path(plan.costs)) if plan.costs else measure_profile(plan, folder / PROFILE_FOLDER)
    runs, failures = compare_all(plan, folder / "runs", workloads)
    predictions, reasons = _predictions(runs, workloads, profile)
    cells = collect(map(load_run, runs.values()), predictions, plan.slo)
    differing = differing_answers(runs)
    complaints = [*failures, *(problem for cell in cells for problem in cell.problems)]
    for planned, found in differing.items():
        named = ", ".join(found[:10])
        complaints.append(f"{planned}: {len(found)} answers differ from the first run's of the workload: {named}")
    report = Report(
        made_at=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=plan.command,
        machine=machine(),
        model=profile.server.model,
        slo=plan.slo,
        complaints=complaints,
        cells=cells,
        differing={planned.workload for planned in differing},
        not_simulated=reasons,
        costs=profile.costs,
    )
    saved = {name: getattr(report, name) for name in ("made_at", "command", "machine", "model", "slo", "complaints")}
    write_json(folder / "summary.json", saved | {"cells": summaries(cells)})
    write_report(folder, report)
    return report


def take_profile(plan: Plan, folder: Path) -> None:
    """Take a profile, and save it with all workloads in the tokens of the model; the plan has no runs.

    Raises:
        LoadTestError: a server failed, or too little was measured.
    """
    shutil.rmtree(folder / "runs", ignore_errors=True)
    make_workloads(plan, folder, WORKLOADS)
    measure_profile(plan, folder)


# -- their parts -------------------------------------------------------------------------------------------------------


def workload_file(folder: Path, name: str) -> Path:
    return folder / f"workload-{slug(name)}.jsonl"


def make_workloads(plan: Plan, folder: Path, names: Collection[str]) -> None:
    """Make workloads with the tokenizer of a server, each in a file of the folder.

    Raises:
        LoadTestError: the server does not start or does not answer, or a workload does not fit the model.
    """
    if not names:
        return
    folder.mkdir(parents=True, exist_ok=True)
    options = server_options(plan.model, Setup(policy="fcfs", options=plan.options))
    with ServerProcess(options, folder / "preparation.log") as server, ShoalClient(server.url) as client:
        max_model_len = ServerInfo.of(server).limits.max_model_len
        for name in dict.fromkeys(names):
            what = name, plan.num_requests, plan.seed
            made = make_workload(*what, lambda text: list(client.tokenize(text).token_ids), max_model_len)
            write_workload(workload_file(folder, name), made)


def compare_all(plan: Plan, folder: Path, workloads: Workloads) -> tuple[Runs, list[str]]:
    """Measure all runs of a plan, each in its folder unless it is there.

    A server or a load generator that fails costs its run only, and the comparison goes on with the next one.

    Returns:
        The folders of what was measured, in this order, runs that broke off too; and in words, what could not be run.
    """
    runs: Runs = {}
    failures: list[str] = []
    capacity: dict[tuple[str, tuple[str, ...]], float] = {}  # by workload and options: the most requests/s
    for number, asked in enumerate(bar := tqdm(plan.runs, unit="run", desc="comparison"), 1):
        bar.set_postfix_str(str(asked))
        planned, alike = asked, (asked.workload, asked.setup.options)
        if share := asked.load.share:
            if alike not in capacity:
                failures.append(f"{asked}: no closed loop was measured, so there is no open loop")
                continue
            rate = float(f"{share * capacity[alike]:.3g}")  # three digits, so that a name shows all of it
            planned = replace(asked, load=replace(asked.load, rate=rate, share=0.0))
        run_folder = folder / f"{number:03}-{planned.name}"
        try:
            measure(run_folder, planned, plan.model, workloads[planned.workload])
        except ShoalError as error:
            failures.append(f"{planned}: {error}")
        if (run_folder / RUN_FILE).exists():
            runs[planned] = run_folder
            run = load_run(run_folder, with_steps=False)
            if run.load.users and run.is_complete:
                capacity[alike] = max(capacity.get(alike, 0.0), summarize(run, plan.slo)["request rate"])
    return runs, failures


def differing_answers(runs: Runs) -> dict[PlannedRun, list[str]]:
    """By run of a server, the requests whose answers are not those of the first one of the same workload."""
    first: dict[tuple[str, str], tuple[int, str]] = {}
    found: defaultdict[PlannedRun, list[str]] = defaultdict(list)
    for planned, folder in _of_servers(runs).items():
        for record in read_results(folder / REQUESTS_FILE).records:
            answer = record.num_output_tokens, record.text_hash
            if record.is_answered and first.setdefault((planned.workload, record.request_id), answer) != answer:
                found[planned].append(record.request_id)
    return found


def measure_profile(plan: Plan, folder: Path) -> Profile:
    """Measure the runs of a profile, each unless it is there, and save what follows from them.

    Raises:
        LoadTestError: a server failed, or too little was measured.
    """
    workloads = {name: read_workload(workload_file(folder, name)) for name in PROFILED}
    runs: list[Run] = []
    for number, (asked, num_requests) in enumerate(tqdm(SERIES.items(), unit="run", desc="profile"), 1):
        planned = replace(asked, setup=replace(asked.setup, options=plan.options))
        run_folder = folder / "runs" / f"{number:03}-{planned.name}"
        num_engines = runs[0].server.num_engines if runs else 1
        measure(run_folder, planned, plan.model, workloads[planned.workload][: num_requests * num_engines])
        runs.append(load_run(run_folder))
    profile = Profile(server=runs[0].server, options=plan.options, versions=machine(), costs=fit(runs))
    write_json(folder / FILE, profile)
    return profile


def _predictions(runs: Runs, workloads: Workloads, profile: Profile) -> tuple[list[Run], list[str]]:
    """What the twin says of each combination, and why it says nothing of others."""
    found: list[Run] = []
    reasons: dict[str, None] = {}
    for planned, folder in {replace(run, repetition=0): folder for run, folder in _of_servers(runs).items()}.items():
        server = read_json(folder / RUN_FILE, Run).server
        try:
            profile.check(server)
            found.append(simulate(planned, workloads[planned.workload], server=server, costs=profile.costs))
        except ShoalError as error:
            reasons[f"{planned.setup.name} was not simulated: {error}"] = None
    return found, list(reasons)


def _of_servers(runs: Runs) -> Runs:
    return {planned: folder for planned, folder in runs.items() if planned.setup.policy != GENERATE}


def summaries(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """All figures of each cell, for a program that reads along."""
    names = ("section", "workload", "load", "setup", "measured", "predicted", "problems")
    alike = {(cell.section, cell.load): by(by(cells, "section")[cell.section], "load")[cell.load] for cell in cells}
    return [
        {name: getattr(cell, name) for name in names}
        | {
            "errors": {name: error.error for name, error in cell.errors.items()},
            "x_static": speed_up("throughput", cell, baseline(alike[cell.section, cell.load])),
            "x_hf_generate": speed_up("throughput", cell, generated(alike[cell.section, cell.load])),
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
