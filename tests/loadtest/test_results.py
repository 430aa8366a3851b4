"""Results files: whole, cut off anywhere, and broken."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from shoal.loadtest.records import LoadTestError, RequestRecord
from shoal.loadtest.traffic import Begin, End, Results, read_results

RECORDS = [
    RequestRecord(request_id="late", client="é", sent_at=2.0, token_times=[2.5, 2.75], finished_at=3.0),
    RequestRecord(request_id="early", sent_at=1.0, error="HTTP 500: no"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in (Begin(12.5), *RECORDS, End(1.25))))
    return path


def test_what_is_read_is_what_was_written_in_the_order_in_which_it_was_sent(path: Path) -> None:
    expected = Results(RECORDS[::-1], started_at=12.5, cpu_seconds=1.25)
    assert read_results(path) == expected


def test_a_file_that_is_cut_off_anywhere_gives_all_whole_lines(path: Path) -> None:
    whole = path.read_bytes()
    for size in range(0, len(whole), 11):
        path.write_bytes(whole[:size])
        result = read_results(path)
        num_lines = whole[:size].count(b"\n")
        assert len(result.records) == max(min(num_lines - 1, 2), 0)
        assert not result.cpu_seconds


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "request"}', '{"kind": "end", "cpu_seconds": "much"}'])
def test_a_broken_line_is_named_by_its_number(path: Path, line: str) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(LoadTestError, match=r"results\.jsonl, line 3: "):
        read_results(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match="cannot be read"):
        read_results(tmp_path / "none")
