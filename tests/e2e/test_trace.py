"""Exact ends and the step trace of a whole server: what the trace says is what was answered."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.loadtest.trace import stays
from shoal.scheduler.step_record import StepRecord
from tests.e2e.checkpoints import cycle_text
from tests.e2e.conftest import StartServer
from tests.e2e.harness import Server, Waiting, joined

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ENDS = (60, 1, 25, 7, 40)
REQUIRED = {  # by phase, as the Trace Event Format has it
    "X": {"name", "ph", "ts", "dur", "pid", "tid"},
    "C": {"name", "ph", "ts", "pid", "args"},
    "M": {"name", "ph", "pid", "args"},
}


def events(path: Path) -> list[dict[str, Any]]:
    """All of a trace, whose array is not closed yet."""
    found: list[dict[str, Any]] = json.loads(path.read_text() + "]")
    for event in found:
        assert event.keys() >= REQUIRED[event["ph"]]
        assert event.get("dur", 0) >= 0
    return found


def records(found: list[dict[str, Any]]) -> list[StepRecord]:
    """The steps of a trace in which anything was computed."""
    steps = [event["args"] for event in found if (event["name"], event["ph"]) == ("step", "X")]
    return [step for step in msgspec.convert(steps, list[StepRecord]) if step.shares]


@pytest.mark.parametrize("policy", ["fcfs", "static"])
def test_the_trace_agrees_with_the_answers(start: StartServer, tmp_path: Path, policy: str) -> None:
    path = tmp_path / "trace.json"
    server = start("--trace", str(path), "--policy", policy, "--max-num-seqs", "2").wait_ready()
    waiting = [
        Waiting(server, COMPLETIONS, prompt="Z", temperature=0, max_tokens=100, end_after=end_after)
        for end_after in ENDS
    ]
    answers = [one.answer().json() for one in waiting]
    for answer, end_after in zip(answers, ENDS, strict=True):
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == (cycle_text(end_after - 1), "stop")
        assert answer["usage"]["completion_tokens"] == end_after
    server.wait_idle()

    found = events(path)
    spans, steps = [event for event in found if event["ph"] == "X"], records(found)
    requests = stays(steps)
    assert requests.keys() == {f"{answer['id']}-0-0" for answer in answers}
    for answer in answers:
        usage, request_id = answer["usage"], f"{answer['id']}-0-0"
        shares = [share for step in steps for share in step.shares if share.request_id == request_id]
        rows = [share.row for share in shares if share.samples > share.is_padding]
        assert len(rows) == usage["completion_tokens"]
        assert set(rows) <= {0, 1}
        assert len(set(rows)) == 1
        (slot,) = [span for span in spans if span["name"] == request_id]
        assert slot["tid"] == 2 + rows[0]
        stay = requests[request_id]
        assert stay.arrived_at < stay.joined_at
        left_at = max(
            step.start + step.seconds for step in steps if request_id in {one.request_id for one in step.shares}
        )
        assert (slot["ts"], slot["ts"] + slot["dur"]) == pytest.approx((stay.joined_at * 1e6, left_at * 1e6))
        computed = sum(share.num_scheduled_tokens for share in shares)
        least = usage["prompt_tokens"] + usage["completion_tokens"] - 1
        assert computed > least if any(share.is_padding for share in shares) else computed == least
    assert any(share.is_padding for step in steps for share in step.shares) == (policy == "static")


def speaks(server: Server, ends: int) -> str:
    """Complete, check the text and return the id of the answer."""
    answer = server.complete("Z", temperature=0, max_tokens=50, end_after=ends)
    assert answer["choices"][0]["text"] == cycle_text(ends - 1)
    answer_id: str = answer["id"]
    return answer_id


def test_every_choice_ends_there_and_a_new_engine_goes_on_with_the_trace(start: StartServer, tmp_path: Path) -> None:
    """With speculation, which this model's text makes easy: several tokens come with a step, and the end among them."""
    path = tmp_path / "trace.json"
    server = start("--trace", str(path), "--speculation", "suffix", "--num-spec-tokens", "4").wait_ready()
    answer = server.complete(["Z", "Z"], temperature=0, max_tokens=90, end_after=50, n=2)
    assert [choice["text"] for choice in answer["choices"]] == [cycle_text(49)] * 4
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    assert answer["usage"]["completion_tokens"] == 4 * 50
    assert answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 0
    message = [{"role": "user", "content": "Z"}]
    chunks = server.stream(
        CHAT, messages=message, max_tokens=90, end_after=20, seed=1, stream_options={"include_usage": True}
    )
    assert chunks[-1]["usage"]["completion_tokens"] == 20
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert joined(chunks)
    first = speaks(server, 30)

    engine = server.engine_pid()
    os.kill(engine, signal.SIGKILL)
    server.until("a new engine has come", lambda: server.engine_pid() != engine)
    server.wait_ready()
    last = speaks(server, 5)
    found = events(path)
    assert {event["pid"] for event in found} == {engine, server.engine_pid()}
    steps = records(found)
    requests = {share.request_id for step in steps for share in step.shares}
    assert {f"{one}-0-0" for one in (first, last, chunks[0]["id"])} <= requests
    assert {f"{answer['id']}-{rest}" for rest in ("0-0", "0-1", "1-0", "1-1")} <= requests
    assert any(share.num_spec_tokens for step in steps for share in step.shares)

    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert len(json.loads(path.read_text())) >= len(found), "closed, it is JSON as it is"
