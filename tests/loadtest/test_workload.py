"""Saved workloads: what is read is what was written, and what is broken is named by file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.loadtest.records import LoadTestError
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
        ("request_id", "", "Expected `str` of length >= 1"),
        ("session", 7, "Expected `str`, got `int`"),
        ("client", None, "Expected `str`, got `null`"),
        ("prompt", ["text"], "Expected `str`, got `array`"),
        ("prompt_token_ids", [], "Expected `array` of length >= 1"),
        ("prompt_token_ids", [1, -1], "Expected `int` >= 0"),
        ("prompt_token_ids", [1, 2.5], "Expected `int`, got `float`"),
        ("num_output_tokens", 0, "Expected `int` >= 1"),
        ("num_output_tokens", True, "Expected `int`, got `bool`"),
        ("max_tokens", 2.5, "Expected `int`, got `float`"),
        ("temperature", -0.5, "Expected `float` >= 0"),
        ("temperature", "0.5", "Expected `float`, got `str`"),
        ("priority", 1.5, "Expected `int`, got `float`"),
        ("ttft_slo_ms", 0, "Expected `float` > 0"),
        ("arrival_time", -1, "Expected `float` >= 0"),
    ],
)
def test_a_wrong_value_is_named_by_line_and_field(tmp_path: Path, field: str, value: Any, what: str) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(lines_of(RIGHT, RIGHT | {"request_id": "b", field: value}))
    with pytest.raises(LoadTestError) as raised:
        read_workload(path)
    for words in (f"{path}, line 2: ", what, f"$.{field}"):
        assert words in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (lines_of(RIGHT) + "{\n", "line 2: Input data was truncated"),
        (lines_of(RIGHT) + "\n", "line 2: Input data was truncated"),
        (lines_of(RIGHT) + "[" * 100_000, "line 2: "),
        (lines_of(RIGHT | {"priority": float("nan")}), "line 1: JSON is malformed"),
        (lines_of(RIGHT | {"arrival_time": 10**400}), "line 1: "),
        ("[]\n", "line 1: Expected `object`"),
        (lines_of(RIGHT | {"prompts": 1}), "line 1: Object contains unknown field `prompts`"),
        (
            lines_of({name: value for name, value in RIGHT.items() if name != "session"}),
            "missing required field `session`",
        ),
        (lines_of(RIGHT | {"num_output_tokens": 6}), "line 1: num_output_tokens is 6, above max_tokens, 5"),
        (lines_of(RIGHT, RIGHT), "line 2: request_id 'a' is that of line 1 too"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(content)
    with pytest.raises(LoadTestError) as raised:
        read_workload(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match=r"none\.jsonl cannot be read"):
        read_workload(tmp_path / "none.jsonl")
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"request_id": "\xff"}\n')
    with pytest.raises(LoadTestError, match=r"line 1: .*(utf|UTF)-8"):
        read_workload(path)
