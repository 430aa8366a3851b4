"""Saved workloads: what is read is what was written, and what is broken is named by file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.loadtest.errors import WorkloadError
from shoal.loadtest.workload import WorkloadRequest, read_workload, write_workload

RIGHT: dict[str, Any] = {
    "request_id": "a",
    "session": "a",
    "prompt": "text",
    "prompt_token_ids": [1, 2],
    "num_output_tokens": 3,
    "max_tokens": 5,
}
names = st.text(min_size=1, max_size=20)
limits = st.none() | st.floats(0.1, 1e6)


@st.composite
def requests(draw: st.DrawFn) -> WorkloadRequest:
    max_tokens = draw(st.integers(1, 1000))
    return WorkloadRequest(
        request_id=draw(names),
        session=draw(names),
        client=draw(st.text(max_size=20)),
        prompt=draw(names),
        prompt_token_ids=draw(st.lists(st.integers(0, 4095), min_size=1, max_size=5)),
        num_output_tokens=draw(st.integers(1, max_tokens)),
        max_tokens=max_tokens,
        temperature=draw(st.floats(0, 2)),
        seed=draw(st.integers(0, 2**64 - 1)),
        priority=draw(st.integers(-1000, 1000)),
        ttft_slo_ms=draw(limits),
        tpot_slo_ms=draw(limits),
        arrival_time=draw(st.none() | st.floats(0, 1e6)),
    )


@settings(max_examples=40)
@given(st.lists(requests(), min_size=1, max_size=5, unique_by=lambda request: request.request_id))
def test_what_is_read_is_what_was_written(written: list[WorkloadRequest]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "w.jsonl"
        write_workload(path, written)
        assert read_workload(path) == written


def lines_of(*requests: dict[str, Any]) -> str:
    return "".join(json.dumps(request) + "\n" for request in requests)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("request_id", "", "a string that is not empty"),
        ("session", 7, "a string that is not empty"),
        ("client", None, "a string"),
        ("prompt", ["text"], "a string that is not empty"),
        ("prompt_token_ids", [], "a list of token ids"),
        ("prompt_token_ids", [1, -1], "a list of token ids"),
        ("prompt_token_ids", [1, 2.0], "a list of token ids"),
        ("num_output_tokens", 0, "an integer of at least 1"),
        ("num_output_tokens", -4, "an integer of at least 1"),
        ("num_output_tokens", True, "an integer of at least 1"),
        ("max_tokens", 2.5, "an integer of at least 1"),
        ("temperature", float("nan"), "a finite number of at least 0"),
        ("temperature", float("inf"), "a finite number of at least 0"),
        ("temperature", -0.5, "a finite number of at least 0"),
        ("temperature", "0.5", "a finite number of at least 0"),
        ("seed", 2**64, "an integer of 64 bits"),
        ("priority", 1.5, "an integer"),
        ("ttft_slo_ms", 0, "null or a number above 0"),
        ("tpot_slo_ms", float("nan"), "null or a number above 0"),
        ("arrival_time", -1, "null or a number of at least 0"),
        ("arrival_time", 10**400, "null or a number of at least 0"),
    ],
)
def test_a_wrong_value_is_named_by_line_and_field(tmp_path: Path, field: str, value: Any, what: str) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(lines_of(RIGHT, RIGHT | {"request_id": "b", field: value}))
    with pytest.raises(WorkloadError, match=f"line 2: {field} must be {what}") as raised:
        read_workload(path)
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 300 + len(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (lines_of(RIGHT) + "{\n", "line 2: not valid JSON"),
        (lines_of(RIGHT) + "\n", "line 2: not valid JSON"),
        (lines_of(RIGHT) + "[" * 100_000, "line 2: not valid JSON"),
        ("[]\n", "line 1: must be a JSON object"),
        (lines_of(RIGHT | {"prompts": 1}), "line 1: unknown field 'prompts'"),
        (lines_of({name: value for name, value in RIGHT.items() if name != "session"}), "field 'session' is missing"),
        (lines_of(RIGHT | {"num_output_tokens": 6}), "num_output_tokens is 6, but can be at most max_tokens"),
        (lines_of(RIGHT, RIGHT), "line 2: request_id 'a' is that of line 1 too"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(content)
    with pytest.raises(WorkloadError) as raised:
        read_workload(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"none\.jsonl cannot be read"):
        read_workload(tmp_path / "none.jsonl")
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"request_id": "\xff"}\n')
    with pytest.raises(WorkloadError, match="is not UTF-8"):
        read_workload(path)
