"""One run: real locust processes against a fake server that fails on command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from shoal.loadtest import measure
from shoal.loadtest.measure import run_locust, server_options
from shoal.loadtest.records import Load, LoadTestError, ServerInfo, Setup
from shoal.loadtest.traffic import read_results
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
def test_a_closed_loop_has_as_many_in_flight_as_users(server: StreamingServer, workload: Path, tmp_path: Path) -> None:
    run_locust(server.url, workload, Load(users=4), tmp_path / "r.jsonl")
    result = read_results(tmp_path / "r.jsonl")
    assert {record.error for record in result.records} == {None}
    assert sorted(record.request_id for record in result.records) == sorted(f"r{i}" for i in range(30))
    assert {record.num_output_tokens for record in result.records} == {2, 3, 4}
    assert server.most_at_once == 4
    assert 0 < result.cpu_seconds < 60
    assert result.started_at > 0


@pytest.mark.parametrize("server", [{"dies_after": 12}], indirect=True)
def test_a_server_that_dies_ends_the_run_with_what_was_measured(
    server: StreamingServer, workload: Path, tmp_path: Path
) -> None:
    run_locust(server.url, workload, Load(users=2), tmp_path / "r.jsonl")
    records = read_results(tmp_path / "r.jsonl").records
    assert sum(record.is_answered for record in records) >= 10
    assert any((record.error or "").startswith("connection: ") for record in records)
    assert len(records) < 31


def test_locust_that_hangs_is_stopped(workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = tmp_path / "hangs.py"
    hangs.write_text("import time; time.sleep(1000)", "utf-8")
    monkeypatch.setattr(measure, "LOCUSTFILE", hangs)
    monkeypatch.setattr(measure, "STUCK_SECONDS", 0.2)
    with pytest.raises(LoadTestError, match="locust ended with exit code -9"):
        run_locust("http://127.0.0.1:1", workload, Load(), tmp_path / "r.jsonl")


def test_locust_that_fails_says_why(workload: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match=r"(?s)exit code 2.*must be named by an http:// or https:// address"):
        run_locust("nowhere", workload, Load(users=1), tmp_path / "r.jsonl")
    with pytest.raises(LoadTestError, match="has no arrival_time"):
        run_locust("http://127.0.0.1:1", workload, Load(), tmp_path / "r.jsonl")


# -- the server ------------------------------------------------------------------------------------------------------


def saying(answer: object) -> Any:
    """A server that says this of itself."""
    request = httpx.Request("GET", "http://127.0.0.1:1/server_info")
    return SimpleNamespace(fetch=lambda path: httpx.Response(200, json=answer, request=request))


def test_a_server_says_what_it_is() -> None:
    info = ServerInfo.of(saying({"model": "m", "limits": {"num_blocks": 12, "max_model_len": 128}}))
    assert (info.model, info.limits.num_blocks, info.limits.max_model_len) == ("m", 12, 128)
    assert info.limits.block_size == 16


def test_an_answer_that_makes_no_sense_is_named() -> None:
    with pytest.raises(LoadTestError, match="server_info: max_model_len must be at least 1"):
        ServerInfo.of(saying({"model": "m", "limits": {"num_blocks": 12, "max_model_len": 0}}))


def test_the_command_line_of_a_server() -> None:
    setup = Setup(policy="sjf", speculation="draft", options=("--max-num-seqs", "8"))
    assert server_options("tiny", setup) == [
        *("--model", "tiny", "--policy", "sjf", "--speculation", "draft"),
        *("--max-queue-seconds", "0", "--max-num-seqs", "8"),
    ]
