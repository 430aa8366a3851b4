"""Runs locust without its web interface, in a process of its own, as the load of a comparison."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from shoal.loadtest.arrivals import check_load
from shoal.loadtest.errors import LoadTestError, ServerDiedError
from shoal.loadtest.records import Load, RequestRecord
from shoal.loadtest.results import RECORD_PREFIX, LocustResult, read_results
from shoal.loadtest.stream import is_connection_error
from shoal.loadtest.traffic import CUT_OFF
from shoal.loadtest.workload import read_workload

LOCUSTFILE = Path(__file__).with_name("locustfile.py")

_REQUEST_TIMEOUT_SECONDS = 600.0
_STALLED_SECONDS = _REQUEST_TIMEOUT_SECONDS + 60
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 10.0  # for what should take no time
_LOG_LINES = 15


class BrokenOffError(ServerDiedError):
    """The server ended in the middle of a run.

    Attributes:
        result: what was measured until then, and the requests that failed.
    """

    def __init__(self, message: str, result: LocustResult) -> None:
        super().__init__(message)
        self.result = result


def run_locust(url: str, workload: Path, load: Load, results: Path, *, observe: Callable[[int], None]) -> LocustResult:
    """Put a load on a server until all requests are answered.

    A load without users and without a rate is a replay: requests are sent when the workload says (`arrival_time`).

    Args:
        workload: a file of requests.
        results: file of what was measured, which grows as requests end; locust's log lies beside it.
        observe: is told how many requests have ended, several times a second.

    Raises:
        WorkloadError: the workload is broken.
        LoadTestError: the load is out of range, or locust failed or stalled.
        BrokenOffError: the server does not answer any more; what was measured is in it, and in the file.
    """
    check_load(load, read_workload(workload))
    results.unlink(missing_ok=True)
    log = results.with_suffix(".locust.log")
    with _locust(_command(url, workload, load, results), log) as process:
        _follow(process, results, observe)
        if process.returncode:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
            raise LoadTestError(f"locust ended with exit code {process.returncode}; its log:\n{tail}")
    result = read_results(results)
    last = _last_heard(result)
    if last and is_connection_error(last) and not _answers(url):
        raise BrokenOffError(f"the server at {url} ended in the middle of the run: {last.error}", result)
    return result


def _command(url: str, workload: Path, load: Load, results: Path) -> list[str]:
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
        "--request-timeout": repr(_REQUEST_TIMEOUT_SECONDS),
        "--exit-code-on-error": "0",  # requests that fail are in the results
    }
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"]
    command += [word for option in options.items() for word in option]
    return command if load.users or load.rate else [*command, "--replay"]


@contextmanager
def _locust(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process, which does not outlive the context."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=LOCUSTFILE.parent.parent,  # where it finds our packages
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _follow(process: subprocess.Popen[bytes], results: Path, observe: Callable[[int], None]) -> None:
    """Report progress until the process ends."""
    num_finished, size, grew_at = 0, 0, time.monotonic()
    is_running = True
    while is_running:
        is_running = process.poll() is None
        if results.exists():
            with results.open("rb") as file:
                file.seek(size)
                for line in file:
                    if line.endswith(b"\n"):
                        size += len(line)
                        num_finished += line.startswith(RECORD_PREFIX)
                        grew_at = time.monotonic()
        observe(num_finished)
        if time.monotonic() - grew_at > _STALLED_SECONDS:
            raise LoadTestError(f"nothing was measured for {_STALLED_SECONDS:g} s, after {num_finished} requests")
        if is_running:
            time.sleep(_POLL_SECONDS)


def _last_heard(result: LocustResult) -> RequestRecord | None:
    """The request whose end was the server's last sign of life, or lack of one."""
    ended = (record for record in result.records if record.error != CUT_OFF)
    return max(ended, key=lambda record: record.finished_at or 0.0, default=None)


def _answers(url: str) -> bool:
    """Whether anything answers there."""
    try:
        httpx.get(f"{url}/health", timeout=_PATIENCE_SECONDS, trust_env=False)
    except httpx.TransportError:
        return False
    return True
