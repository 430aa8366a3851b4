"""The profile of a load test: its runs, and those that are measured amid the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.loadtest.records import LoadTestError, ServerDiedError
from shoal.loadtest.metrics import Slo
from shoal.loadtest.plan import Plan, PlannedRun
from shoal.loadtest.prediction import PROFILE_WORKLOADS, ProfileRuns
from shoal.loadtest.preparation import Facts
from shoal.loadtest.profile import SERIES
from shoal.loadtest.records import Load, Setup
from shoal.loadtest.storage import Storage
from shoal.loadtest.study import RUNS_BETWEEN, _Profiler
from shoal.loadtest.workload_files import Sending

PLAN = Plan(experiments=(), num_requests=1, slo=Slo())
FACTS = Facts(model="m", options=("--threads", "2"), announced=None)  # type: ignore[arg-type]  # not looked at


class Folder:
    """In place of a storage and a measurer: remembers what was measured, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Path] = {}
        self.measured: list[str] = []

    def find(self, planned: PlannedRun) -> Path | None:
        return self.found.get(planned.name)

    def workload_file(self, name: str) -> Path:
        return self.path / name

    def load(self, folder: Path) -> Path:
        return folder

    def measure(self, planned: PlannedRun, sending: Sending) -> Path:
        self.measured.append(planned.name)
        self.found[planned.name] = self.path / planned.name
        return self.found[planned.name]


def profile_runs(folder: Any) -> ProfileRuns:
    return ProfileRuns(FACTS, dict.fromkeys(PROFILE_WORKLOADS, ()), folder, folder)


def test_the_series_is_run_again_and_again_and_nothing_twice(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    first = profile_runs(folder)
    for _ in range(len(SERIES) + 2):
        first.take()
    assert len(set(folder.measured)) == len(folder.measured) == len(first.taken) == len(SERIES) + 2
    assert all("threads-2" in name for name in folder.measured)
    resumed = profile_runs(folder)
    for _ in range(len(SERIES) + 3):
        resumed.take()
    assert resumed.taken[:-1] == first.taken
    assert len(folder.measured) == len(SERIES) + 3, "all but the last were there"


class Runs:
    """Profile runs of which the second fails."""

    def __init__(self) -> None:
        self.num_taken = 0

    def take(self) -> None:
        self.num_taken += 1
        if self.num_taken == 2:
            raise ServerDiedError("out of memory")


def test_a_run_of_the_profile_comes_between_and_its_failure_costs_the_comparison_nothing(tmp_path: Path) -> None:
    profiler = _Profiler(PLAN, Storage(tmp_path / "out", PLAN), FACTS, {})
    profiler._runs = runs = Runs()  # type: ignore[assignment]
    measured: list[PlannedRun] = []

    def measure(planned: PlannedRun, sending: object, observe: object) -> Path:
        measured.append(planned)
        return tmp_path

    both = profiler.amid(measure)
    planned = PlannedRun(setup=Setup(policy="fcfs"), workload="chat", load=Load(users=1))
    taken = []
    for _ in range(3 * RUNS_BETWEEN):
        assert both(planned, Sending(tmp_path, Load(users=1)), lambda _: None) == tmp_path
        taken.append(runs.num_taken)
    assert len(measured) == 3 * RUNS_BETWEEN
    assert [taken[number * RUNS_BETWEEN - 1] for number in (1, 2, 3)] == [1, 2, 2], "no further one after a failure"
    assert taken[RUNS_BETWEEN - 2] == 0
    (failure,) = profiler.failures
    assert "broke off: out of memory" in failure


def test_a_server_that_dies_before_the_comparison_is_an_error(tmp_path: Path) -> None:
    profiler = _Profiler(PLAN, Storage(tmp_path / "out", PLAN), FACTS, {})
    profiler._runs = runs = Runs()  # type: ignore[assignment]
    runs.taken = []  # type: ignore[attr-defined]
    with pytest.raises(LoadTestError, match="out of memory"):
        profiler.take_first()
