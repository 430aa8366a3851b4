"""`shoal loadtest` and `shoal simulate` as their users call them, with real servers and a real load generator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shoal.loadtest.cli import loadtest, simulate
from shoal.loadtest.costs import CostModel, Latencies, StepCosts
from shoal.loadtest.profile import Profile, write_profile
from shoal.loadtest.server_options import KNOBS
from shoal.loadtest.workload import WorkloadRequest, read_workload
from shoal.scheduler.config import SchedulerConfig

NUM_REQUESTS = 5


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Costs that are made up."""
    steps = StepCosts(
        token_counts=(1, 512),
        token_seconds=(0.001, 0.1),
        pair_seconds=0.0,
        key_seconds=0.0,
        sample_seconds=0.0001,
        stream_seconds=0.0,
        join_seconds=0.0,
        ordered_seconds=0.0,
        gap_seconds=0.0,
        stream_gap_seconds=0.0,
        arrival_gap_seconds=0.0,
    )
    latencies = Latencies(**dict.fromkeys(Latencies.__slots__, 0.001))
    folder = tmp_path_factory.mktemp("profile")
    write_profile(
        folder,
        Profile(
            model="shoal-moe",
            limits=SchedulerConfig(num_blocks=4096, max_model_len=1024),
            knobs=KNOBS,
            costs=CostModel(steps=steps, latencies=latencies),
        ),
        {},
    )
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, profile: Path) -> Iterator[tuple[Path, Result, list[str]]]:
    """The folder of a small comparison, what it printed, and its arguments."""
    folder = tmp_path_factory.mktemp("comparison") / "out"
    args = ["--policies", "static,fcfs", "--workload", "chat", "--users", "3", "--requests", str(NUM_REQUESTS)]
    args += ["--costs", str(profile), "--output", str(folder)]
    yield folder, CliRunner().invoke(loadtest, [*args, "--", "--threads", "1"]), args


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def test_a_comparison_measures_the_same_work_and_reports_it(compared: tuple[Path, Result, list[str]]) -> None:
    folder, result, _ = compared
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    assert [one["setup"] for one in last["results"]] == ["static", "fcfs"]
    assert Path(last["report"]).read_text("utf-8").lstrip().lower().startswith("<!doctype html")
    asked = {request.request_id: request for request in read_workload(folder / "workload-chat.jsonl")}
    runs = [read(path) for path in sorted(folder.glob("runs/*/run.json"))]
    assert len(runs) == 2 and len(asked) == NUM_REQUESTS
    assert [answers(run, asked) for run in runs] == [answers(runs[0], asked)] * 2
    cells = read(folder / "summary.json")["cells"]
    for cell in cells:
        assert cell["measured"]["median"]["num_errors"] == 0
        assert cell["measured"]["median"]["engine"]["num_steps"] > 0
        assert cell["measured"]["median"]["queueing"]["p50"] >= 0
    assert cells[0]["x_static"] == 1.0


def answers(run: dict[str, Any], asked: dict[str, WorkloadRequest]) -> dict[str, str]:
    """Hashes of the texts by request, of which each has the length that was asked for."""
    for record in run["requests"]:
        assert record["num_output_tokens"] == asked[record["request_id"]].num_output_tokens
    return {record["request_id"]: record["text_hash"] for record in run["requests"]}


def test_a_comparison_that_is_complete_is_not_measured_again(compared: tuple[Path, Result, list[str]]) -> None:
    folder, first, args = compared
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")}
    second = CliRunner().invoke(loadtest, [*args, "--resume", "--", "--threads", "1"])
    assert second.exit_code == 0, second.output
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")} == before
    assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]


def test_a_simulation_replays_the_workload_of_a_comparison(
    compared: tuple[Path, Result, list[str]], profile: Path
) -> None:
    folder, _, _ = compared
    args = ["--policies", "all", "--users", "3", "--replay", str(folder / "workload-chat.jsonl")]
    result = CliRunner().invoke(simulate, [*args, "--costs", str(profile), "--", "--max-num-seqs", "2"])
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout.splitlines()[-1])["results"]
    assert {"static", "fcfs", "sjf-oracle"} <= {one["setup"] for one in results}
    assert all(one["throughput"] > 0 for one in results)
