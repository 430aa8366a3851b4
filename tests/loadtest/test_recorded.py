"""Traces of Mooncake and of Azure: as they are published, written and read again, and refused by line and field."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.loadtest.arrivals import open_arrivals
from shoal.loadtest.recorded import read_requests, recorded, write_recorded
from shoal.loadtest.records import Load, LoadTestError
from shoal.loadtest.stream import request_body
from shoal.loadtest.workload import read_workload, write_workload
from tests.loadtest.twin import ask

# As the two publish them.
MOONCAKE = """\
{"timestamp": 27482, "input_length": 1055, "output_length": 52, "hash_ids": [46, 47, 2353]}
{"timestamp": 30535, "input_length": 1030, "output_length": 26, "hash_ids": [46, 47, 2366]}
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""


def save(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


def test_mooncakes_lines_are_requests_that_share_their_blocks(tmp_path: Path) -> None:
    first, second = read_requests(save(tmp_path, MOONCAKE))
    assert (first.arrival_time, second.arrival_time) == (27.482, 30.535)
    assert (len(first.prompt_token_ids), first.num_output_tokens, second.num_output_tokens) == (1055, 52, 26)
    assert first.prompt_token_ids[:1024] == second.prompt_token_ids[:1024]
    assert first.prompt_token_ids[1024:1030] != second.prompt_token_ids[1024:]
    assert min(first.prompt_token_ids) >= 256 and max(first.prompt_token_ids) < 512


def test_azures_lines_are_requests_that_share_nothing(tmp_path: Path) -> None:
    first, second = read_requests(save(tmp_path, AZURE))
    assert first.arrival_time == 0
    assert second.arrival_time == pytest.approx(4.314579)
    assert (len(first.prompt_token_ids), first.num_output_tokens) == (374, 44)
    assert first.prompt_token_ids[:16] != second.prompt_token_ids[:16]


def test_lengths_shrink_and_prefixes_stay_shared(tmp_path: Path) -> None:
    first, second = read_requests(save(tmp_path, MOONCAKE), shrink=8)
    assert (len(first.prompt_token_ids), first.num_output_tokens) == (132, 7)
    assert first.prompt_token_ids[:128] == second.prompt_token_ids[:128]


def test_a_prompt_without_a_text_is_sent_in_tokens(tmp_path: Path) -> None:
    request = read_requests(save(tmp_path, MOONCAKE))[0]
    body = msgspec.json.decode(request_body(request))
    assert body["prompt"] == request.prompt_token_ids
    assert (body["end_after"], body["max_tokens"]) == (52, 52)
    write_workload(tmp_path / "workload", [request])
    assert read_workload(tmp_path / "workload") == read_requests(tmp_path / "workload") == [request]


tokens = st.integers(0, 3)
prompts = st.builds(
    lambda stem, copies, rest: [*(stem * 300)[: 512 * copies], *rest],
    st.lists(tokens, min_size=2, max_size=2),
    st.integers(0, 2),
    st.lists(tokens, min_size=1, max_size=600),
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**6), prompts, st.integers(1, 2000)), min_size=1, max_size=12),
    st.sampled_from(["trace.jsonl", "trace.csv"]),
)
def test_what_is_written_is_read(asked: list[tuple[int, list[int], int]], name: str) -> None:
    gaps = accumulate(gap for gap, _, _ in asked)
    workload = [
        replace(ask(f"r{n}", 1, length, max_tokens=2000), prompt_token_ids=prompt, arrival_time=microseconds / 1e6)
        for n, (microseconds, (_, prompt, length)) in enumerate(zip(gaps, asked, strict=True))
    ]
    rows = list(recorded(open_arrivals(Load(), workload)))
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        write_recorded(path, rows)
        found = list(recorded(open_arrivals(Load(), read_requests(path))))
    begin = rows[0].timestamp if name.endswith("csv") else 0.0
    assert [one.timestamp for one in found] == pytest.approx([one.timestamp - begin for one in rows], abs=2e-3)
    lengths = [(one.input_length, one.output_length) for one in rows]
    assert [(one.input_length, one.output_length) for one in found] == lengths
    if name.endswith("jsonl"):
        assert [one.hash_ids for one in found] == [one.hash_ids for one in rows]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (MOONCAKE + "{broken", "line 3: "),
        (MOONCAKE.replace("1030", "0"), r"line 2: .*>= 1 - at `\$.input_length`"),
        (MOONCAKE.replace("27482", "-1"), r"line 1: .*`\$.timestamp`"),
        (MOONCAKE.replace(', "output_length": 26', ""), "line 2: .*missing required field `output_length`"),
        (MOONCAKE.replace(", 2366", ""), "line 2: hash_ids: 2 of them for input_length, which has 3 blocks"),
        (AZURE.replace("ContextTokens", "Context"), "line 1: the header must be TIMESTAMP,ContextTokens,Gen"),
        (AZURE.replace(",396,", ",-3,"), "line 3: ContextTokens must be a whole number of at least 1, not '-3'"),
        (AZURE.replace(",109", ",many"), "line 3: GeneratedTokens must be a whole number of at least 1, not 'many'"),
        (AZURE.replace(",396,", ","), "line 3: 2 fields instead of 3"),
        (AZURE.replace("2023-11-16 18:15:50", "noon"), "line 3: TIMESTAMP must be like 2023"),
        (AZURE.replace("18:15:50", "17:15:50"), "line 3: TIMESTAMP .* is before that of the first request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "is empty"),
    ],
)
def test_broken_lines_are_named(text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match=complaint):
        read_requests(save(tmp_path, text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match="gone cannot be read"):
        read_requests(tmp_path / "gone")


def test_fields_of_other_versions_are_passed_over(tmp_path: Path) -> None:
    text = MOONCAKE.replace('"output_length": 52', '"output_length": 52, "session": "s"')
    assert len(read_requests(save(tmp_path, text))) == 2
