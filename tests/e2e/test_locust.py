"""Locust as its users start it, against the real server."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from msgspec.structs import replace

from shoal.loadtest.arrivals import open_arrivals
from shoal.loadtest.measure import LOCUSTFILE, run_locust
from shoal.loadtest.records import Load, RequestRecord
from shoal.loadtest.traffic import read_results
from shoal.loadtest.workload import WorkloadRequest, make_workload, read_workload, write_workload
from tests.e2e.harness import PATIENCE, Server

NUM_REQUESTS = 12


@pytest.fixture(scope="module")
def workload(main: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chat, cut to outputs of at most 40 tokens."""

    def tokenize(text: str) -> list[int]:
        token_ids: list[int] = main.post("/tokenize", prompt=text).json()["tokens"]
        return token_ids

    path = tmp_path_factory.mktemp("workload") / "chat.jsonl"
    made = make_workload("chat", NUM_REQUESTS, 1, tokenize, 1024)
    write_workload(path, [replace(request, num_output_tokens=min(request.num_output_tokens, 40)) for request in made])
    return path


def check_records(records: list[RequestRecord], requests: list[WorkloadRequest]) -> None:
    """All requests are answered, with as many tokens as the workload says, at times that make sense."""
    by_id = {request.request_id: request for request in requests}
    assert Counter(record.request_id for record in records) == Counter(by_id.keys())
    for record in records:
        request = by_id[record.request_id]
        assert record.error is None
        assert record.client == request.client
        assert record.engine_id.startswith("cmpl-")
        assert record.num_prompt_tokens == len(request.prompt_token_ids)
        assert record.num_output_tokens == request.num_output_tokens
        assert 1 <= len(record.token_times) <= request.num_output_tokens
        assert record.finished_at is not None
        times = [record.sent_at, *record.token_times, record.finished_at]
        assert times == sorted(times) or times[-1] - times[-2] > -1e-5  # those of tokens are rounded
    assert records == sorted(records, key=lambda record: record.sent_at)


def test_closed_and_open_loop_and_replay_have_the_same_texts(main: Server, workload: Path, tmp_path: Path) -> None:
    requests = read_workload(workload)
    texts = []
    for number, load in enumerate((Load(users=8), Load(rate=40.0, burstiness=3.0, seed=5))):
        results = tmp_path / f"{number}.jsonl"
        run_locust(main.url, workload, load, results)
        records = read_results(results).records
        check_records(records, requests)
        texts.append({record.request_id: record.text_hash for record in records})
        if load.rate:
            assert [record.sent_at for record in records] == [due for due, _ in open_arrivals(load, requests)]
    assert texts[0] == texts[1]
    main.wait_idle()


def test_plain_locust_writes_its_own_files_and_a_workload_that_can_be_replayed(
    main: Server, workload: Path, tmp_path: Path
) -> None:
    """With two workers, between which the requests are divided."""
    options = ["--workload", workload, "--users", "6", "--spawn-rate", "6", "--processes", "2"]
    files = ["--csv", "stats", "--html", "report.html", "--results", "results.jsonl", "--record", "recorded.jsonl"]
    locust(tmp_path, main.url, *map(str, options), *files)
    parts = [read_results(tmp_path / f"results-{worker}.jsonl").records for worker in (0, 1)]
    assert all(parts)
    records = sorted(chain(*parts), key=lambda record: record.sent_at)
    check_records(records, read_workload(workload))
    rows = {row["Type"]: row for row in csv.DictReader((tmp_path / "stats_stats.csv").read_text().splitlines())}
    assert {"POST", "TTFT", "tokens"} <= rows.keys()
    for kind in ("POST", "TTFT", "tokens"):
        assert (int(rows[kind]["Request Count"]), int(rows[kind]["Failure Count"])) == (NUM_REQUESTS, 0)
    mean = sum(record.num_output_tokens for record in records) / NUM_REQUESTS
    assert float(rows["tokens"]["Average Response Time"]) == pytest.approx(mean)
    assert "TTFT" in (tmp_path / "report.html").read_text()

    recorded = [request for worker in (0, 1) for request in read_workload(tmp_path / f"recorded-{worker}.jsonl")]
    assert sorted(request.arrival_time or 0.0 for request in recorded) == [record.sent_at for record in records]
    write_workload(tmp_path / "recorded.jsonl", recorded)
    run_locust(main.url, tmp_path / "recorded.jsonl", Load(), tmp_path / "again.jsonl")
    again = read_results(tmp_path / "again.jsonl").records
    assert [record.sent_at for record in again] == [record.sent_at for record in records]
    assert {r.request_id: r.text_hash for r in again} == {r.request_id: r.text_hash for r in records}


def test_a_run_that_recorded_nothing_fails(workload: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no request was sent and recorded"):
        locust(tmp_path, "http://127.0.0.1:1", "--workload", str(workload), "--replay", "--processes", "2")


def locust(folder: Path, url: str, *options: str) -> None:
    """Run locust in a folder until it ends."""
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", url, *options]
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
