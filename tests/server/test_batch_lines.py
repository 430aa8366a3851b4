"""What is a line of a batch, and what is wrong with one that is none."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.server.batches.lines import Line, read_lines
from shoal.server.wire.batches import MAX_LINES, BatchError
from shoal.server.wire.parsing import parse_body
from shoal.server.wire.requests import ChatBody

URL = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Zählt\u2028das?"}], "temperature": 0.5}


def line(**changes: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": URL, "body": BODY} | changes


def read(*lines: dict[str, Any] | str, max_bytes: int = 10_000) -> list[Line | BatchError]:
    data = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines).encode()
    return list(read_lines([data], URL, max_bytes))


@given(
    lines=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=6),
    cuts=st.lists(st.integers(0, 2000)),
    ends=st.sampled_from(["", "\n", "\r\n\n"]),
)
def test_it_does_not_matter_how_a_file_is_cut(lines: list[str], cuts: list[int], ends: str) -> None:
    data = "\n".join(json.dumps(line(custom_id=f"{i}{text}")) for i, text in enumerate(lines)).encode() + ends.encode()
    bounds = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    pieces = [data[start:end] for start, end in itertools.pairwise(bounds)]
    found = list(read_lines(pieces, URL, 10_000))
    assert [(each.number, each.custom_id) for each in found if isinstance(each, Line)] == [
        (i + 1, f"{i}{text}") for i, text in enumerate(lines)
    ]
    assert len(found) == len(lines)


def test_a_body_is_least_urgent_and_has_a_seed() -> None:
    one, given_, null = read(
        line(), line(body=BODY | {"seed": -5, "priority": -9}), line(body=BODY | {"seed": None, "stream": False})
    )
    assert isinstance(one, Line) and isinstance(given_, Line) and isinstance(null, Line)
    drawn, kept = msgspec.json.decode(one.body), msgspec.json.decode(given_.body)
    assert {name: drawn[name] for name in BODY} == BODY
    assert (kept["seed"], kept["priority"]) == (-5, 1000)
    assert 0 <= drawn["seed"] < 2**53 and drawn["seed"] != msgspec.json.decode(null.body)["seed"]
    body = parse_body(ChatBody, one.body)
    assert (body.priority, body.ttft_slo_ms, body.tpot_slo_ms) == (1000, 3_600_000, 3_600_000)


@pytest.mark.parametrize(
    ("bad", "code", "param", "message"),
    [
        ("{", "invalid_json_line", None, "not valid JSON"),
        ('{"custom_id": "\udcff"}', "invalid_json_line", None, "not valid JSON"),
        ("[1]", "invalid_request", None, "expected an object"),
        (line(custom_id=None), "invalid_request", "custom_id", "expected text"),
        (line(custom_id="x" * 513), "invalid_request", "custom_id", "512"),
        (line(method="GET"), "invalid_request", "method", "expected 'POST'"),
        (line(url="/v1/completions"), "url_mismatch", "url", "as the batch has it"),
        (line(body=[]), "invalid_request", "body", "expected an object"),
        (line(body=BODY | {"stream": True}), "invalid_request", "body", "no streams"),
        (line(body=BODY | {"background": True}), "invalid_request", "body", "body.background"),
        (line(other=1), "invalid_request", "other", "unrecognized"),
        ({"custom_id": "a"}, "invalid_request", "method", "missing required field"),
        (line(custom_id="y" * 10_001), "invalid_request", None, "more than 10000 bytes"),
    ],
)
def test_what_is_no_line(bad: dict[str, Any] | str, code: str, param: str | None, message: str) -> None:
    data = bad.encode(errors="surrogateescape") if isinstance(bad, str) else json.dumps(bad).encode()
    good, error, *_ = read_lines([json.dumps(line()).encode() + b"\n", data, b"\n"], URL, 10_000)
    assert isinstance(good, Line) and isinstance(error, BatchError)
    assert (error.code, error.param, error.line) == (code, param, 2)
    assert message in error.message and len(error.message) <= 300


def test_a_file_of_too_many_lines_is_not_read_on() -> None:
    def pieces():  # type: ignore[no-untyped-def]
        for _ in range(4):
            yield b"\n" * MAX_LINES
        raise AssertionError

    (error,) = read_lines(pieces(), URL, 1000)
    assert isinstance(error, BatchError) and (error.code, error.line) == ("too_many_tasks", MAX_LINES + 1)
