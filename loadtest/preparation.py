"""What a comparison needs before it begins: workloads in the model's tokens, and what its server says of itself."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shoal.clients import ClientError, ShoalClient
from shoal.loadtest.errors import ServerDiedError
from shoal.loadtest.measuring import server_options
from shoal.loadtest.plan import Plan
from shoal.loadtest.records import Setup
from shoal.loadtest.server_options import KNOBS, NAMES, apply_options
from shoal.loadtest.server_process import Announced, ServerProcess
from shoal.loadtest.storage import Storage, write_json
from shoal.loadtest.workload import WorkloadRequest, read_workload
from shoal.loadtest.workload_files import WorkloadFiles
from shoal.loadtest.workloads import make_workload
from shoal.scheduler.config import SchedulerConfig

Key = tuple[str, int, int]  # name of a workload, number of requests, seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of the servers under test.

    Attributes:
        model: its name in the API.
        announced: by a server with `options`.
    """

    model: str
    options: tuple[str, ...]
    announced: Announced

    @property
    def config(self) -> tuple[SchedulerConfig, dict[str, Any]]:
        """Limits and knobs of a server with `options`."""
        said = asdict(self.announced)
        del said["url"]
        usual = SchedulerConfig(num_blocks=self.announced.num_blocks, max_model_len=self.announced.max_model_len)
        tokens = max(usual.max_num_batched_tokens, self.announced.max_num_seqs)
        limits = replace(usual, **said, max_num_batched_tokens=tokens)
        return apply_options(_named(self.options, NAMES - said.keys()), (), limits, KNOBS)


class Preparation:
    """Asks one server, if there is something left to ask, and saves what it says.

    Args:
        options: of all servers.
    """

    def __init__(self, plan: Plan, storage: Storage, files: WorkloadFiles, options: Sequence[str]) -> None:
        self._plan = plan
        self._storage = storage
        self._files = files
        self._options = tuple(options)
        self._facts_file = storage.folder / "server.json"

    def run(self, further: Iterable[Key] = ()) -> tuple[Facts, dict[Key, list[WorkloadRequest]]]:
        """Save the plan's workloads, and make `further` ones.

        Raises:
            ServerDiedError: the server does not start or does not answer.
            WorkloadError: a workload is unknown, or does not fit the model.
        """
        if self._plan.replay:
            self._files.copy(self._plan.workloads[0], read_workload(Path(self._plan.replay)))
        missing, further = self._files.missing(self._plan.workloads), list(further)
        if self._facts_file.exists() and not missing and not further:
            return _read_facts(self._facts_file), {}
        setup = Setup(policy="fcfs", options=self._options)
        with (
            ServerProcess(server_options(self._plan.model, setup), self._storage.folder / "preparation.log") as server,
            ShoalClient(server.url) as client,
        ):
            try:
                return self._ask(server.announced, client, missing, further)
            except ClientError as error:
                server.check()
                raise ServerDiedError(f"the server did not answer while workloads were made: {error}") from error

    def _ask(
        self, announced: Announced, client: ShoalClient, missing: Sequence[str], further: Sequence[Key]
    ) -> tuple[Facts, dict[Key, list[WorkloadRequest]]]:
        def tokenize(text: str) -> list[int]:
            return list(client.tokenize(text).token_ids)

        for name in missing:
            self._files.make(name, self._plan.num_requests, self._plan.seed, tokenize, announced.max_model_len)
        facts = Facts(model=client.models()[0].id, options=self._options, announced=announced)
        write_json(self._facts_file, facts)
        return facts, {key: make_workload(*key, tokenize, announced.max_model_len) for key in further}


def machine() -> dict[str, str]:
    """What a comparison runs on, for people."""
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "system": platform.platform(terse=True),
        "Python": platform.python_version(),
        "Shoal": version("shoal"),
        "locust": version("locust"),
    }


def _processor() -> str:
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _named(options: Sequence[str], names: Collection[str]) -> list[str]:
    """Of a command line, the options of these names, with their values."""
    kept: list[str] = []
    is_kept = False
    for word in options:
        if word.startswith("--"):
            is_kept = word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") in names
        if is_kept:
            kept.append(word)
    return kept


def _read_facts(path: Path) -> Facts:
    saved = json.loads(path.read_text("utf-8"))
    return Facts(model=saved["model"], options=tuple(saved["options"]), announced=Announced(**saved["announced"]))
