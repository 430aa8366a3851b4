"""Real locust processes against a fake server that fails on command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.loadtest.records import LoadTestError, ServerDiedError
from shoal.loadtest.locust_run import BrokenOffError, run_locust
from shoal.loadtest.records import Load
from shoal.loadtest.results import read_results
from shoal.loadtest.workload import WorkloadRequest, write_workload
from tests.loadtest.streaming_server import StreamingServer


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    """Thirty requests of 2 to 4 tokens, in sessions of three."""
    path = tmp_path / "workload.jsonl"
    requests = [
        WorkloadRequest(
            request_id=f"r{index}",
            session=f"s{index // 3}",
            client=f"c{index % 2}",
            prompt=f"prompt {index}",
            prompt_token_ids=[index],
            num_output_tokens=2 + index % 3,
            max_tokens=9,
        )
        for index in range(30)
    ]
    write_workload(path, requests)
    return path


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[StreamingServer]:
    server = StreamingServer(**request.param)
    yield server
    server.close()


@pytest.mark.parametrize("server", [{"seconds": 0.02}], indirect=True)
def test_a_closed_loop_has_as_many_in_flight_as_users_and_reports_its_progress(
    server: StreamingServer, workload: Path, tmp_path: Path
) -> None:
    progress: list[int] = []
    result = run_locust(server.url, workload, Load(users=4), tmp_path / "r.jsonl", observe=progress.append)
    assert result.is_whole
    assert {record.error for record in result.records} == {None}
    assert sorted(record.request_id for record in result.records) == sorted(f"r{i}" for i in range(30))
    assert {record.num_output_tokens for record in result.records} == {2, 3, 4}
    assert server.most_at_once == 4
    assert progress == sorted(progress)
    assert progress[-1] == 30
    assert 0 < result.cpu_seconds < 60
    assert result.started_at > 0
    assert result == read_results(tmp_path / "r.jsonl")


@pytest.mark.parametrize("server", [{"dies_after": 12}], indirect=True)
def test_a_server_that_dies_ends_the_run_with_what_was_measured(
    server: StreamingServer, workload: Path, tmp_path: Path
) -> None:
    with pytest.raises(BrokenOffError, match="ended in the middle of the run: connection") as raised:
        run_locust(server.url, workload, Load(users=2), tmp_path / "r.jsonl", observe=lambda _: None)
    assert isinstance(raised.value, ServerDiedError)
    answered = [record for record in raised.value.result.records if record.error is None]
    assert len(answered) >= 10
    assert read_results(tmp_path / "r.jsonl") == raised.value.result


@pytest.mark.parametrize("server", [{}], indirect=True)
@pytest.mark.parametrize(
    ("load", "message"),
    [
        (Load(), "has no arrival_time"),
        (Load(rate=-1.0), "rate must be a finite number above 0"),
        (Load(users=1, think_seconds=-1.0), "think_seconds must be"),
    ],
)
def test_bad_input_is_refused_before_locust_starts(
    server: StreamingServer, workload: Path, tmp_path: Path, load: Load, message: str
) -> None:
    with pytest.raises(LoadTestError, match=message):
        run_locust(server.url, workload, load, tmp_path / "r.jsonl", observe=lambda _: None)
    workload.write_text("{\n")
    with pytest.raises(LoadTestError, match="line 1: not valid JSON"):
        run_locust(server.url, workload, Load(users=1), tmp_path / "r.jsonl", observe=lambda _: None)
    assert server.requests == []


def test_locust_that_fails_says_why(workload: Path, tmp_path: Path) -> None:
    with pytest.raises(match=r"(?s)exit code 2.*must be named by an http:// or https:// address"):
        run_locust("nowhere", workload, Load(users=1), tmp_path / "r.jsonl", observe=lambda _: None)
