"""`shoal loadtest` and `shoal simulate` as their users call them, with real servers and a real load generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shoal.loadtest.cli import loadtest, simulate
from shoal.loadtest.costs import CostModel
from shoal.loadtest.measure import load_run
from shoal.loadtest.profile import FILE, Profile
from shoal.loadtest.records import RequestRecord, ServerInfo, write_json
from shoal.loadtest.workload import WorkloadRequest, read_workload
from tests.e2e.harness import Server
from tests.loadtest.twin import REALISTIC

NUM_REQUESTS = 5


@pytest.fixture(scope="module")
def profile(main: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Costs that are made up, of a server that was asked."""
    costs: CostModel = REALISTIC
    folder = tmp_path_factory.mktemp("profile")
    write_json(folder / FILE, Profile(server=ServerInfo.of(main), costs=costs))
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, profile: Path) -> tuple[Path, Result]:
    """The folder of a small comparison, and what it printed."""
    folder = tmp_path_factory.mktemp("comparison") / "out"
    args = ["--policies", "static,fcfs", "--workload", "chat", "--users", "3", "--requests", str(NUM_REQUESTS)]
    args += ["--costs", str(profile), "--output", str(folder)]
    return folder, CliRunner().invoke(loadtest, [*args, "--", "--threads", "1"])


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def test_a_comparison_measures_the_same_work_and_reports_it(compared: tuple[Path, Result]) -> None:
    folder, result = compared
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    assert [one["setup"]["policy"] for one in last["results"]] == ["static", "fcfs"]
    assert "<!doctype html" in Path(last["report"]).read_text("utf-8").lower()
    asked = {request.request_id: request for request in read_workload(folder / "workload-chat.jsonl")}
    runs = [load_run(path) for path in sorted(folder.glob("runs/*"))]
    assert len(runs) == 2 and len(asked) == NUM_REQUESTS
    assert [answers(run.requests, asked) for run in runs] == [answers(runs[0].requests, asked)] * 2
    cells = read(folder / "summary.json")["cells"]
    for cell in cells:
        figures = cell["measured"]["median"]
        assert figures["errors"] == 0
        assert figures["steps"] > 0
        assert figures["queueing p50"] >= 0
        assert cell["predicted"]["throughput"] > 0
    assert cells[0]["x_static"] == 1.0


def answers(records: list[RequestRecord], asked: dict[str, WorkloadRequest]) -> dict[str, str]:
    """Hashes of the texts by request, of which each has the length that was asked for."""
    for record in records:
        assert record.num_output_tokens == asked[record.request_id].num_output_tokens
    return {record.request_id: record.text_hash for record in records}


def test_a_comparison_that_is_complete_is_not_measured_again(compared: tuple[Path, Result]) -> None:
    folder, first = compared
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")}
    second = CliRunner().invoke(loadtest, ["--output", str(folder), "--resume"])
    assert second.exit_code == 0, second.output
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")} == before
    assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]


def test_a_simulation_replays_the_workload_of_a_comparison(compared: tuple[Path, Result], profile: Path) -> None:
    folder, _ = compared
    args = ["--policies", "all", "--users", "3", "--replay", str(folder / "workload-chat.jsonl")]
    result = CliRunner().invoke(simulate, [*args, "--costs", str(profile), "--", "--max-num-seqs", "2"])
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout.splitlines()[-1])["results"]
    assert {"static", "fcfs", "sjf-oracle"} <= {one["setup"]["policy"] for one in results}
    assert all(one["measured"]["median"]["throughput"] > 0 for one in results)
