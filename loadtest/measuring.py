"""One measured run: a server is started, warmed, put under load, and ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from shoal.clients import ClientError, ShoalClient
from shoal.loadtest.errors import LoadTestError, ServerDiedError
from shoal.loadtest.locust_run import run_locust
from shoal.loadtest.metrics import is_answered
from shoal.loadtest.plan import PlannedRun
from shoal.loadtest.records import Load, Run, Setup
from shoal.loadtest.results import LocustResult, read_results
from shoal.loadtest.server_process import ServerProcess
from shoal.loadtest.storage import LOG_FILE, REQUESTS_FILE, Storage, pack
from shoal.loadtest.workload import read_workload
from shoal.loadtest.workload_files import Sending

WARMING_ROUNDS, WARMING_REQUESTS, WARMING_TOKENS = 2, 8, 16

Observe = Callable[[int], None]
StartServer = Callable[[Sequence[str], Path], AbstractContextManager[ServerProcess]]


class RunLoad(Protocol):
    """What sends a workload to a server: `run_locust`, or a fake."""

    def __call__(self, url: str, workload: Path, load: Load, results: Path, *, observe: Observe) -> LocustResult: ...


@dataclass(frozen=True, kw_only=True)
class Measurer:
    """Measures runs, and saves each with all that belongs to it.

    Args:
        model: that the servers serve.
        storage: where runs are saved.
    """

    model: str
    storage: Storage
    start_server: StartServer = ServerProcess
    run_load: RunLoad = field(default=run_locust)
    warm: Callable[[str], None] = field(default_factory=lambda: warm)

    def measure(self, planned: PlannedRun, sending: Sending, observe: Observe = lambda _: None) -> Path:
        """Measure a run, into a folder of its own.

        Args:
            observe: told the number of requests that have ended.

        Raises:
            ServerDiedError: the server did not start, or died.
            LoadTestError: the load generator failed.  What was measured until then is saved.
        """
        folder = self.storage.new_folder(planned)
        trace = folder / "trace.json"
        try:
            self._measure(planned, sending, folder, trace, observe)
        finally:
            pack(trace)
        return folder

    def _measure(self, planned: PlannedRun, sending: Sending, folder: Path, trace: Path, observe: Observe) -> None:
        options = server_options(self.model, planned.setup, trace)
        with self.start_server(options, folder / LOG_FILE) as server:
            self._warm(server)
            before = server.cpu_seconds()
            results = folder / REQUESTS_FILE
            block_size = server.announced.block_size
            try:
                result = self.run_load(server.url, sending.workload, sending.load, results, observe=observe)
                server.check()
            except LoadTestError:
                if results.exists():
                    result = read_results(results)
                    run = _assemble(planned, sending.workload, result, block_size)
                    self.storage.save(folder, replace(run, is_complete=False), result.started_at)
                raise
            api, engine = (now - then for now, then in zip(server.cpu_seconds(), before, strict=True))
            run = _assemble(planned, sending.workload, result, block_size)
            run.api_cpu_seconds, run.engine_cpu_seconds = api, engine
            self.storage.save(folder, run, result.started_at)

    def _warm(self, server: ServerProcess) -> None:
        try:
            self.warm(server.url)
        except ClientError as error:
            server.check()
            raise ServerDiedError(f"the server did not answer while it was warmed: {error}") from error


def _assemble(planned: PlannedRun, workload: Path, result: LocustResult, block_size: int) -> Run:
    """The run, but for its steps and what the server cost."""
    priorities = {request.request_id: request.priority for request in read_workload(workload)}
    for record in result.records:
        record.priority = priorities[record.request_id]
    return Run(
        setup=planned.setup,
        workload=planned.workload,
        load=planned.load,
        repetition=planned.repetition,
        requests=sorted(result.records, key=lambda record: record.sent_at),
        block_size=block_size,
        generator_cpu_seconds=result.cpu_seconds,
        is_complete=sum(map(is_answered, result.records)) == len(priorities),
    )


def server_options(model: str, setup: Setup, trace: Path | None = None) -> list[str]:
    """The command line of `shoal serve` for a setup."""
    tracing = [] if trace is None else ["--trace", str(trace.absolute())]
    return ["--model", model, "--policy", setup.policy, "--speculation", setup.speculation, *tracing, *setup.options]


def warm(url: str) -> None:
    """Have a server compute a few short requests, alone and together, that no workload contains.

    Raises:
        ClientError: it does not answer.
    """
    with ShoalClient(url, read_timeout=60.0) as client, ThreadPoolExecutor(WARMING_REQUESTS) as pool:

        def ask(number: int) -> None:
            client.complete(f"Warm-up {number}:", max_tokens=WARMING_TOKENS, temperature=0, user="warm-up")

        for _ in range(WARMING_ROUNDS):
            ask(0)
            list(pool.map(ask, range(WARMING_REQUESTS)))
