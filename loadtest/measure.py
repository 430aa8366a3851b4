"""One measured run: a server is started, warmed, put under load by locust, and ended; all in a folder of its own.

server.log, trace.json.gz    of the server; Perfetto opens the trace
requests.jsonl, locust.log   of the load generator
run.json                     the run but for its requests and steps; the last file that is written
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from shoal.clients import ClientError, ShoalClient
from shoal.loadtest.plan import PlannedRun
from shoal.loadtest.records import Load, LoadTestError, Run, ServerDiedError, Setup, read_json, write_json
from shoal.loadtest.server import ServerProcess
from shoal.loadtest.trace import pack, read_trace
from shoal.loadtest.traffic import read_results
from shoal.loadtest.workload import WorkloadRequest, write_workload

RUN_FILE, REQUESTS_FILE, TRACE_FILE = "run.json", "requests.jsonl", "trace.json.gz"
LOCUSTFILE = Path(__file__).with_name("locustfile.py")
REQUEST_TIMEOUT_SECONDS = 600.0
STALLED_SECONDS = REQUEST_TIMEOUT_SECONDS + 60
POLL_SECONDS, END_SECONDS = 0.2, 10.0
NUM_LOG_LINES = 15

Observe = Callable[[int], None]


class Sent(NamedTuple):
    """What is sent in a run."""

    requests: Sequence[WorkloadRequest]
    load: Load


class Tools(NamedTuple):
    """What a run is measured with: `TOOLS`, or a test's fakes."""

    start_server: Callable[[Sequence[str], Path], AbstractContextManager[ServerProcess]]
    run_load: Callable[[str, Path, Load, Path, Observe], None]
    warm: Callable[[str], None]


def measure(planned: PlannedRun, model: str, sent: Sent, folder: Path, *, observe: Observe, tools: Tools) -> None:
    """Measure a run into its empty folder.

    Args:
        sent: what is sent for the planned run.
        observe: is told the number of requests that have ended.

    Raises:
        ServerDiedError: the server did not start, or died.
        LoadTestError: the load generator failed.  What was measured until then is saved.
    """
    trace, workload = folder / "trace.json", folder / "workload.jsonl"
    write_workload(workload, sent.requests)
    try:
        with tools.start_server(
            [*server_options(model, planned.setup), "--trace", str(trace.absolute())], folder / "server.log"
        ) as server:
            try:
                tools.warm(server.url)
            except ClientError as error:
                server.check()
                raise ServerDiedError(f"the server did not answer while it was warmed: {error}") from error
            run = Run(
                setup=planned.setup,
                workload=planned.workload,
                load=planned.load,
                repetition=planned.repetition,
                server=server.info(),
            )
            before = server.cpu_seconds()
            try:
                tools.run_load(server.url, workload, sent.load, folder / REQUESTS_FILE, observe)
                server.check()
            except LoadTestError:
                _save(folder, run, num_requests=0)
                raise
            run.api_cpu_seconds, run.engine_cpu_seconds = (
                now - then for now, then in zip(server.cpu_seconds(), before, strict=True)
            )
            _save(folder, run, len(sent.requests))
    finally:
        workload.unlink()
        pack(trace, folder / TRACE_FILE)


def _save(folder: Path, run: Run, num_requests: int) -> None:
    """Write the run's file, if anything was measured.

    Args:
        num_requests: that a complete run answers; 0 if the run broke off.
    """
    if (folder / REQUESTS_FILE).exists():
        results = read_results(folder / REQUESTS_FILE)
        run.started_at, run.generator_cpu_seconds = results.started_at, results.cpu_seconds
        run.is_complete = sum(record.is_answered for record in results.records) == num_requests > 0
        write_json(folder / RUN_FILE, run)


def load_run(folder: Path, *, with_steps: bool = True) -> Run:
    """A run that was saved in this folder, its steps without those that warmed the server.

    Raises:
        LoadTestError: a file is missing or broken.
    """
    run = read_json(folder / RUN_FILE, Run)
    is_traced = with_steps and (folder / TRACE_FILE).exists()
    steps = read_trace(folder / TRACE_FILE, run.started_at) if is_traced else []
    return replace(run, requests=read_results(folder / REQUESTS_FILE).records, steps=steps)


def server_options(model: str, setup: Setup) -> list[str]:
    """The command line of `shoal serve` for a setup."""
    return ["--model", model, "--policy", setup.policy, "--speculation", setup.speculation, *setup.options]


def warm(url: str) -> None:
    """Have a server compute a few short requests, alone and together, that no workload contains.

    Raises:
        ClientError: it does not answer.
    """
    with ShoalClient(url, read_timeout=60.0) as client, ThreadPoolExecutor(8) as pool:

        def ask(number: int) -> None:
            client.complete(f"Warm-up {number}:", max_tokens=16, temperature=0, user="warm-up")

        for _ in range(2):
            ask(0)
            list(pool.map(ask, range(8)))


def run_locust(url: str, workload: Path, load: Load, results: Path, observe: Observe = lambda _: None) -> None:
    """Put a load on a server until all requests are answered or the server is gone.

    Args:
        results: file of what was measured, which grows as requests end; locust's log is beside it.
        observe: is told how many requests have ended, several times a second.

    Raises:
        LoadTestError: locust failed or stalled.
    """
    users = max(load.users, 1)
    options = {
        "--host": url,
        "--workload": str(workload.absolute()),
        "--results": str(results.absolute()),
        "--users": str(users),
        "--spawn-rate": str(users),  # all at once
        "--think-seconds": repr(load.think_seconds),
        "--rate": repr(load.rate),
        "--burstiness": repr(load.burstiness),
        "--load-seed": str(load.seed),
        "--request-timeout": repr(REQUEST_TIMEOUT_SECONDS),
        "--exit-code-on-error": "0",  # requests that fail are in the results
    }
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"]
    command += [word for option in options.items() for word in option]
    if not (load.users or load.rate):
        command.append("--replay")
    results.unlink(missing_ok=True)
    log = results.with_name("locust.log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        _follow(process, results, observe)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-NUM_LOG_LINES:])
        raise LoadTestError(f"locust ended with exit code {process.returncode}; the last lines of its log:\n{tail}")


def _follow(process: subprocess.Popen[bytes], results: Path, observe: Observe) -> None:
    """Report progress until the process ends."""
    num_lines, grew_at = 0, time.monotonic()
    is_running = True
    while is_running:
        is_running = process.poll() is None
        found = results.read_bytes().count(b"\n") if results.exists() else 0
        if found > num_lines:
            num_lines, grew_at = found, time.monotonic()
            observe(results.read_bytes().count(b'{"kind":"request"'))
        if time.monotonic() - grew_at > STALLED_SECONDS:
            raise LoadTestError(f"nothing was measured for {STALLED_SECONDS:g} s")
        if is_running:
            time.sleep(POLL_SECONDS)


TOOLS = Tools(start_server=ServerProcess, run_load=run_locust, warm=warm)
