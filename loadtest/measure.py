"""One measured run: a server is started, warmed, put under load by locust, and ended; all in a folder of its own.

server.log, trace.json.gz    of the server; Perfetto opens the trace; of several engines trace-0.json.gz and so on
requests.jsonl, locust.log   of the load generator; generate.log of Hugging Face's `generate`, which needs neither
run.json                     the run but for its requests and steps; the last file that is written
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec.structs import asdict, replace

from shoal.clients import ShoalClient
from shoal.loadtest.generate import run_generate
from shoal.loadtest.records import (
    GENERATE,
    Load,
    LoadTestError,
    PlannedRun,
    Run,
    ServerInfo,
    Setup,
    read_json,
    write_json,
)
from shoal.loadtest.trace import pack, read_trace
from shoal.loadtest.traffic import read_results
from shoal.loadtest.workload import WorkloadRequest, write_workload
from shoal.testing.server import ServerProcess, last_lines

RUN_FILE, REQUESTS_FILE, TRACE_FILE = "run.json", "requests.jsonl", "trace.json.gz"
TRACE_FILES = "trace*.json"  # of several engines, each has its number
LOCUSTFILE = Path(__file__).with_name("locustfile.py")
REQUEST_TIMEOUT_SECONDS = 600.0
STUCK_SECONDS = REQUEST_TIMEOUT_SECONDS + 60  # without a request that ends, after which locust is stopped


def measure(folder: Path, planned: PlannedRun, model: str, requests: Sequence[WorkloadRequest]) -> None:
    """Measure a run in a folder, unless it is there and complete.

    Raises:
        LoadTestError: the server or the load generator failed.  What was measured until then is saved.
    """
    if (folder / RUN_FILE).exists() and read_json(folder / RUN_FILE, Run).is_complete:
        return
    shutil.rmtree(folder, ignore_errors=True)  # what broke off
    folder.mkdir(parents=True)
    trace, workload, results = folder / "trace.json", folder / "workload.jsonl", folder / REQUESTS_FILE
    write_workload(workload, requests)
    generates = planned.setup.policy == GENERATE
    setup = replace(planned.setup, policy="static") if generates else planned.setup  # whose limits hold for both
    options = [*server_options(model, setup), "--trace", str(trace.absolute())]
    try:
        with ServerProcess(options, folder / "server.log") as server:
            run = Run(**asdict(planned), server=ServerInfo.of(server))
            if not generates:
                warm(server.url)
                with _saved(run, folder, len(requests)):
                    before = server.cpu_seconds()
                    run_locust(server.url, workload, planned.load, results)
                    server.check()
                    after = server.cpu_seconds()
                    run.api_cpu_seconds, run.engine_cpu_seconds = after[0] - before[0], after[1] - before[1]
        if generates:
            with _saved(run, folder, len(requests)):
                run_generate(model, workload, planned.load, results, max_rows=run.server.limits.max_num_seqs)
    finally:
        workload.unlink()
        if generates:
            trace.unlink(missing_ok=True)
        for own in folder.glob(TRACE_FILES):
            pack(own, own.with_suffix(".json.gz"))


@contextmanager
def _saved(run: Run, folder: Path, num_requests: int) -> Iterator[None]:
    """Save a run at the end, with what was measured of it until then."""
    try:
        yield
    finally:
        if (folder / REQUESTS_FILE).exists():
            measured = read_results(folder / REQUESTS_FILE)
            run.started_at, run.generator_cpu_seconds = measured.started_at, measured.cpu_seconds
            run.is_complete = sum(record.is_answered for record in measured.records) == num_requests
            write_json(folder / RUN_FILE, run)


def load_run(folder: Path, *, with_steps: bool = True) -> Run:
    """A run that was saved in this folder; raises LoadTestError if a file is missing or broken."""
    run = read_json(folder / RUN_FILE, Run)
    files = sorted(folder.glob(f"{TRACE_FILES}.gz"), key=lambda path: (len(path.name), path.name)) if with_steps else []
    steps, *others = [read_trace(file, run.started_at) for file in files] or [[]]
    return replace(run, requests=read_results(folder / REQUESTS_FILE).records, steps=steps, other_steps=others)


def server_options(model: str, setup: Setup) -> list[str]:
    """The command line of `shoal serve` for a setup.  What overloads it waits, and is measured."""
    chosen = ["--model", model, "--policy", setup.policy, "--speculation", setup.speculation]
    return [*chosen, "--max-queue-seconds", "0", *setup.options]


def warm(url: str) -> None:
    """Have a server compute a few short requests, alone and together."""
    with ShoalClient(url, read_timeout=60.0) as client, ThreadPoolExecutor(8) as pool:

        def ask(number: int) -> None:
            client.complete(f"Warm-up {number}:", max_tokens=16, temperature=0, user="warm-up")

        for _ in range(2):
            ask(0)
            list(pool.map(ask, range(8)))


def run_locust(url: str, workload: Path, load: Load, results: Path) -> None:
    """Put a load on a server until all requests have ended.

    Args:
        results: file of what was measured, which grows as requests end; locust's log is beside it.

    Raises:
        LoadTestError: locust failed, or no request ended for longer than any may take.
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
        size = -1
        try:
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STUCK_SECONDS)
                before, size = size, results.stat().st_size if results.exists() else 0
                if size == before:
                    break
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise LoadTestError(f"locust ended with exit code {process.returncode}; {last_lines(log)}")
