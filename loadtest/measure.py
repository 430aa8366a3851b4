"""One measured run: a server is started, warmed, put under load by locust, and ended; all in a folder of its own.

server.log, trace.json.gz    of the server; Perfetto opens the trace
requests.jsonl, locust.log   of the load generator
run.json                     the run but for its requests and steps; the last file that is written
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from msgspec.structs import asdict, replace

from shoal.clients import ShoalClient
from shoal.loadtest.records import Load, LoadTestError, PlannedRun, Run, Setup, read_json, write_json
from shoal.loadtest.server import ServerProcess, end
from shoal.loadtest.trace import pack, read_trace
from shoal.loadtest.traffic import read_results
from shoal.loadtest.workload import WorkloadRequest, write_workload

RUN_FILE, REQUESTS_FILE, TRACE_FILE = "run.json", "requests.jsonl", "trace.json.gz"
LOCUSTFILE = Path(__file__).with_name("locustfile.py")
REQUEST_TIMEOUT_SECONDS = 600.0
POLL_SECONDS = 0.2
NUM_LOG_LINES = 15

Sent = tuple[Sequence[WorkloadRequest], Load]  # in a run


def find_run(runs: Path, planned: PlannedRun) -> Path | None:
    """The folder among `runs` of a run that was saved, whole or broken off."""
    return next((file.parent for file in runs.glob(f"???-{planned.name}/{RUN_FILE}")), None)


def measure(
    planned: PlannedRun, model: str, sent: Sent, runs: Path, observe: Callable[[int], None] = lambda _: None
) -> Path:
    """The folder of a complete run among `runs`, in which it is measured unless it is there.

    Args:
        observe: is told the number of requests that have ended.

    Raises:
        LoadTestError: the server or the load generator failed.  What was measured until then is saved.
    """
    new = runs / f"{len(list(runs.glob('*'))) + 1:03}-{planned.name}"
    folder = next(runs.glob(f"???-{planned.name}"), new)
    if (folder / RUN_FILE).exists() and read_json(folder / RUN_FILE, Run).is_complete:
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # what broke off
    folder.mkdir(parents=True)
    trace, workload, results = folder / "trace.json", folder / "workload.jsonl", folder / REQUESTS_FILE
    write_workload(workload, sent[0])
    options = [*server_options(model, planned.setup), "--trace", str(trace.absolute())]
    try:
        with ServerProcess(options, folder / "server.log") as server:
            warm(server)
            run = Run(**asdict(planned), server=server.info())
            before = server.cpu_seconds()
            try:
                run_locust(server.url, workload, sent[1], results, observe)
                server.check()
                after = server.cpu_seconds()
                run.api_cpu_seconds, run.engine_cpu_seconds = after[0] - before[0], after[1] - before[1]
            finally:
                if results.exists():
                    measured = read_results(results)
                    run.started_at, run.generator_cpu_seconds = measured.started_at, measured.cpu_seconds
                    run.is_complete = sum(record.is_answered for record in measured.records) == len(sent[0])
                    write_json(folder / RUN_FILE, run)
    finally:
        workload.unlink()
        pack(trace, folder / TRACE_FILE)
    return folder


def load_run(folder: Path, *, with_steps: bool = True) -> Run:
    """A run that was saved in this folder; raises LoadTestError if a file is missing or broken."""
    run = read_json(folder / RUN_FILE, Run)
    is_traced = with_steps and (folder / TRACE_FILE).exists()
    steps = read_trace(folder / TRACE_FILE, run.started_at) if is_traced else []
    return replace(run, requests=read_results(folder / REQUESTS_FILE).records, steps=steps)


def server_options(model: str, setup: Setup) -> list[str]:
    """The command line of `shoal serve` for a setup."""
    return ["--model", model, "--policy", setup.policy, "--speculation", setup.speculation, *setup.options]


def warm(server: ServerProcess) -> None:
    """Have a server compute a few short requests, alone and together; raises LoadTestError if it does not answer."""
    with server.answering(), ShoalClient(server.url, read_timeout=60.0) as client, ThreadPoolExecutor(8) as pool:

        def ask(number: int) -> None:
            client.complete(f"Warm-up {number}:", max_tokens=16, temperature=0, user="warm-up")

        for _ in range(2):
            ask(0)
            list(pool.map(ask, range(8)))


def run_locust(
    url: str, workload: Path, load: Load, results: Path, observe: Callable[[int], None] = lambda _: None
) -> None:
    """Put a load on a server until all requests are answered or the server is gone.

    Args:
        results: file of what was measured, which grows as requests end; locust's log is beside it.
        observe: is told how many requests have ended, several times a second.

    Raises:
        LoadTestError: locust failed.
    """
    options = {
        "--host": url,
        "--workload": workload.absolute(),
        "--results": results.absolute(),
        "--users": max(load.users, 1),
        "--spawn-rate": max(load.users, 1),  # all at once
        "--think-seconds": load.think_seconds,
        "--rate": load.rate,
        "--burstiness": load.burstiness,
        "--load-seed": load.seed,
        "--request-timeout": REQUEST_TIMEOUT_SECONDS,
        "--exit-code-on-error": 0,  # requests that fail are in the results
    }
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"]
    command += [str(word) for option in options.items() for word in option]
    if not (load.users or load.rate):
        command.append("--replay")
    log = results.with_name("locust.log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        is_running = True
        while is_running:
            is_running = process.poll() is None
            if results.exists():
                observe(results.read_bytes().count(b'{"kind":"request"'))
            time.sleep(POLL_SECONDS if is_running else 0)
    finally:
        end(process)
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-NUM_LOG_LINES:])
        raise LoadTestError(f"locust ended with exit code {process.returncode}; the last lines of its log:\n{tail}")
