"""The folder of a comparison, in which everything is saved as soon as it is known.

plan.json                      what is compared; a comparison that broke off goes on with the same plan only
workload-NAME.jsonl            what is asked
runs/NNN-SETUP-WORKLOAD-LOAD-rN/
    server.log, trace.json.gz  of the server; Perfetto opens the trace
    requests.jsonl             of the load generator, a line for each request as it ends
    run.json                   the run but for its steps; the last file that is written
summary.json                   all figures
report.html, *.png
"""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from shoal.loadtest.errors import LoadTestError
from shoal.loadtest.plan import Plan, PlannedRun, slug
from shoal.loadtest.records import Load, RequestRecord, Run, Setup
from shoal.loadtest.steps import EngineRequest, Step, read_trace

RUN_FILE, TRACE_FILE, REQUESTS_FILE, LOG_FILE = "run.json", "trace.json.gz", "requests.jsonl", "server.log"

ReadTrace = Callable[[Path], tuple[list[Step], dict[str, EngineRequest]]]


class Storage:
    """The folder of one comparison.

    Args:
        folder: need not exist.
        is_resumed: whether to go on with what is in it.

    Raises:
        LoadTestError: it holds another comparison, or the same and it is not to be resumed.
    """

    def __init__(self, folder: Path, plan: Plan, *, is_resumed: bool = False, read: ReadTrace = read_trace) -> None:
        self.folder = folder
        self._read = read
        self._runs = folder / "runs"
        plan_file, saved = folder / "plan.json", json.loads(to_json(plan))
        if plan_file.exists():
            _check_resumable(folder, saved, plan_file, is_resumed)
        self._runs.mkdir(parents=True, exist_ok=True)
        write_json(plan_file, saved)

    def withdraw(self) -> None:
        """Free the folder for another plan, if nothing was measured."""
        if not any(self._runs.iterdir()):
            for file in (self.folder / "plan.json", *self.folder.glob("workload-*.jsonl")):
                file.unlink(missing_ok=True)

    def workload_file(self, name: str) -> Path:
        return self.folder / f"workload-{slug(name)}.jsonl"

    def new_folder(self, planned: PlannedRun) -> Path:
        """An empty folder for a run; what broke off of the same run before goes."""
        for old in self._folders(planned):
            shutil.rmtree(old)
        numbers = [int(path.name.partition("-")[0]) for path in self._runs.iterdir()]
        folder = self._runs / f"{max(numbers, default=0) + 1:03}-{planned.name}"
        folder.mkdir()
        return folder

    def find(self, planned: PlannedRun, *, is_complete: bool = True) -> Path | None:
        """The folder of a run that was saved, complete or broken off."""
        for folder in self._folders(planned):
            file = folder / RUN_FILE
            if file.exists() and json.loads(file.read_text("utf-8"))["is_complete"] == is_complete:
                return folder
        return None

    def save(self, folder: Path, run: Run, started_at: float) -> None:
        """Write a run but for its steps, which are in its trace.

        Args:
            started_at: the run's start on the clock of the trace.
        """
        saved = asdict(replace(run, steps=[], engine_requests={}))
        del saved["steps"], saved["engine_requests"]
        write_json(folder / RUN_FILE, saved | {"started_at": started_at})

    def load(self, folder: Path) -> Run:
        """A run that was saved, its steps on its own clock and without those that warmed the server."""
        saved = json.loads((folder / RUN_FILE).read_text("utf-8"))
        run, started_at = _read_run(saved), saved["started_at"]
        steps, engine_requests = self._load_trace(folder)
        return replace(
            run,
            steps=[replace(step, start=step.start - started_at) for step in steps if step.start >= started_at],
            engine_requests={
                name: _shift(request, started_at)
                for name, request in engine_requests.items()
                if request.arrived_at >= started_at
            },
        )

    def load_requests(self, folder: Path) -> Run:
        """The same without its steps."""
        return _read_run(json.loads((folder / RUN_FILE).read_text("utf-8")))

    def _folders(self, planned: PlannedRun) -> list[Path]:
        return [folder for folder in self._runs.iterdir() if folder.name.partition("-")[2] == planned.name]

    def _load_trace(self, folder: Path) -> tuple[list[Step], dict[str, EngineRequest]]:
        packed = folder / TRACE_FILE
        if not packed.exists():
            return [], {}
        with tempfile.NamedTemporaryFile(suffix=".json") as plain:
            with gzip.open(packed) as file:
                shutil.copyfileobj(file, plain)
            plain.flush()
            return self._read(Path(plain.name))


def pack(trace: Path) -> None:
    """Compress the trace of a server that has ended to a twentieth; nothing if it has written none."""
    if trace.exists():
        with trace.open("rb") as plain, gzip.open(trace.with_name(TRACE_FILE), "wb", compresslevel=3) as packed:
            shutil.copyfileobj(plain, packed)
        trace.unlink()


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON of plain data and of dataclasses of them, without NaN, which JSON does not know.

    Raises:
        ValueError: there is one.
    """
    return json.dumps(value, default=_plain, allow_nan=False, ensure_ascii=False, indent=indent)


def write_json(path: Path, value: Any) -> None:
    """Write a file that is whole or not there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(to_json(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _plain(value: Any) -> Any:
    """A dataclass's fields, one level of them."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _read_run(saved: dict[str, Any]) -> Run:
    return Run(
        **{name: value for name, value in saved.items() if name != "started_at"}
        | {
            "setup": Setup(**saved["setup"] | {"options": tuple(saved["setup"]["options"])}),
            "load": Load(**saved["load"]),
            "requests": [RequestRecord(**record) for record in saved["requests"]],
        }
    )


def _shift(request: EngineRequest, by: float) -> EngineRequest:
    return replace(
        request,
        arrived_at=request.arrived_at - by,
        joined_at=None if request.joined_at is None else request.joined_at - by,
        left_at=None if request.left_at is None else request.left_at - by,
    )


def _check_resumable(folder: Path, plan: dict[str, Any], plan_file: Path, is_resumed: bool) -> None:
    before = json.loads(plan_file.read_text("utf-8"))
    different = [name for name in plan if plan[name] != before.get(name)]
    if different:
        raise LoadTestError(
            f"{folder} holds another comparison, which differs in {', '.join(different)}; choose another --output"
        )
    if not is_resumed:
        raise LoadTestError(f"{folder} holds this comparison already; go on with --resume, or choose another --output")
