"""Hugging Face's `generate` as a baseline: which requests form a batch, and what is computed for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.loadtest.generate import answer_all, generate_batch, load_model, run_generate
from shoal.loadtest.records import Load, LoadTestError, RequestRecord
from shoal.loadtest.traffic import read_results
from shoal.loadtest.workload import WorkloadRequest, write_workload
from tests.e2e.checkpoints import random_checkpoint


def request(number: int, *, session: str = "", length: int = 2, prompt: int = 3, **others: Any) -> WorkloadRequest:
    ids = [(7 * number + place) % 300 + 2 for place in range(prompt)]
    fields = {"prompt": "x", "prompt_token_ids": ids, "num_output_tokens": length, "max_tokens": 40}
    return WorkloadRequest(request_id=f"r{number}", session=session or f"r{number}", **fields | others)


class Machine:
    """A clock on which a batch takes a second for each token of its longest output."""

    def __init__(self) -> None:
        self.now = 100.0
        self.batches: list[tuple[float, list[str]]] = []
        self.records: dict[str, RequestRecord] = {}

    def generate(self, batch: list[WorkloadRequest]) -> None:
        self.batches.append((self.now - 100, [one.request_id for one in batch]))
        self.now += max(one.num_output_tokens for one in batch)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def answer(self, requests: list[WorkloadRequest], load: Load, max_rows: int = 8) -> list[tuple[float, list[str]]]:
        def report(record: RequestRecord) -> None:
            self.records[record.request_id] = record

        calls = {"clock": lambda: self.now, "sleep": self.sleep}
        answer_all(requests, load, self.generate, report, max_rows=max_rows, **calls)
        return self.batches


def test_users_wait_for_the_longest_answer_of_their_batch() -> None:
    machine = Machine()
    requests = [request(number, length=length) for number, length in enumerate((2, 5, 3, 1, 4))]
    assert machine.answer(requests, Load(users=2)) == [(0, ["r0", "r1"]), (5, ["r2", "r3"]), (8, ["r4"])]
    record = machine.records["r3"]
    assert (record.sent_at, record.accepted_at, record.token_times, record.finished_at) == (5, 5, [8], 8)
    assert (record.num_prompt_tokens, record.num_output_tokens) == (3, 1)
    assert record.is_answered


def test_requests_of_a_session_follow_each_other() -> None:
    sessions = [request(0, session="a"), request(1, session="a"), request(2, session="b"), request(3, session="c")]
    batches = Machine().answer(sessions, Load(users=2))
    assert [names for _, names in batches] == [["r0", "r2"], ["r1", "r3"]]


def test_a_batch_has_what_has_arrived_and_no_more_than_its_rows() -> None:
    requests = [request(number, arrival_time=time) for number, time in enumerate((0.5, 1.0, 1.5, 2.0, 9.0))]
    machine = Machine()
    assert machine.answer(requests, Load(), max_rows=2) == [
        (0.5, ["r0"]),
        (2.5, ["r1", "r2"]),
        (4.5, ["r3"]),
        (9.0, ["r4"]),
    ]
    assert machine.records["r3"].sent_at == 2.0


def test_a_padded_batch_has_the_tokens_of_each_request_alone(tmp_path: Path) -> None:
    """No token ends a text early."""
    folder = random_checkpoint(tmp_path)
    model = load_model(str(folder))
    requests = [request(number, length=length, prompt=size) for number, (length, size) in enumerate([(9, 3), (30, 17)])]
    tokens = generate_batch(model, requests)
    assert tokens.shape == (2, 17 + 30)
    for row, one in zip(tokens, requests, strict=True):
        text = list(one.prompt_token_ids)
        for _ in range(one.num_output_tokens):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        assert row[17 : 17 + one.num_output_tokens].tolist() == text[len(one.prompt_token_ids) :]


def test_a_process_answers_a_workload(tmp_path: Path) -> None:
    folder, workload, results = random_checkpoint(tmp_path / "model"), tmp_path / "workload.jsonl", tmp_path / "r.jsonl"
    write_workload(workload, [request(number, length=1 + number % 3) for number in range(5)])
    run_generate(str(folder), workload, Load(users=2), results, max_rows=8)
    result = read_results(results)
    assert [(one.num_output_tokens, one.is_answered) for one in result.records] == [(1 + i % 3, True) for i in range(5)]
    assert len({one.finished_at for one in result.records}) == 3, "batches"
    assert result.cpu_seconds > 0
    with pytest.raises(LoadTestError, match="neither a checkpoint folder"):
        run_generate("nothing", workload, Load(users=2), results, max_rows=8)
