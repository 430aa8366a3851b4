"""Traces are read back as what happened, whole or broken off; and what is drawn of steps, before it is drawn."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from shoal.loadtest.records import LoadTestError
from shoal.loadtest.trace import Bar, Stay, bars, pack, read_trace, stays
from shoal.scheduler.step_record import ShareRecord, StepRecord
from shoal.server.engine.chrome_trace import ChromeTrace
from tests.fakes import Harness
from tests.loadtest.made_runs import make_run, share, step


class Traced(Harness):
    """An engine whose steps start at whole seconds and take a quarter of one for each part.

    Attributes:
        records: what the trace was told of.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(max_num_seqs=3, num_blocks=8)
        self.records: list[StepRecord] = []
        self.trace = ChromeTrace(path)
        self.engine.observers = [self.trace, self.records.append]
        self._path = path
        self.engine.clock = self._clock
        self._num_reads = 0

    def _clock(self) -> float:
        self._num_reads += 1
        return self.now + (self._num_reads - 1) % 4 / 4

    @property
    def text(self) -> str:
        """The trace so far."""
        return self._path.read_text()


@pytest.fixture
def traced(tmp_path: Path) -> Traced:
    """`x` waits for a row, `y` is aborted, and `z` is still in the batch."""
    harness = Traced(tmp_path / "written.json")
    for request_id, max_tokens in (("w", 1), ("y", 9), ("z", 9), ("x", 2)):
        harness.add(request_id, [1, 2, 3, 4, 5], max_tokens=max_tokens)
    harness.step()
    harness.step()
    harness.take(harness.scheduler.abort("y"))
    harness.step()
    return harness


def read(folder: Path, text: str, started_at: float = 0.0) -> list[StepRecord]:
    path = folder / "trace.json"
    path.write_text(text)
    pack(path, folder / "trace.json.gz")
    assert not path.exists()
    return read_trace(folder / "trace.json.gz", started_at)


def test_steps_are_read_back_as_the_scheduler_made_them(traced: Traced, tmp_path: Path) -> None:
    steps = read(tmp_path, traced.text)
    assert steps == traced.records
    assert [one.start for one in steps] == [0.0, 1.0, 2.0]
    assert [(each.request_id, each.row) for each in steps[1].shares] == [("y", 1), ("z", 2), ("x", 0)]
    assert stays(steps) == {
        "w": Stay(0.0, 0.0),
        "y": Stay(0.0, 0.0),
        "z": Stay(0.0, 0.0),
        "x": Stay(0.0, 1.0),
    }


def test_what_was_before_the_run_is_left_out_and_the_clock_is_that_of_the_run(traced: Traced, tmp_path: Path) -> None:
    steps = read(tmp_path, traced.text, started_at=0.5)
    assert [one.start for one in steps] == [0.5, 1.5]
    assert stays(steps) == {"x": Stay(-0.5, 0.5)}


def test_a_trace_may_be_broken_off_anywhere(traced: Traced, tmp_path: Path) -> None:
    numbers = set()
    for end in range(0, len(traced.text) + 1, 3):
        found = read(tmp_path, traced.text[:end])
        assert found == traced.records[: len(found)]
        numbers.add(len(found))
    assert numbers == {0, 1, 2, 3}


def test_a_closed_array_is_read_too(traced: Traced, tmp_path: Path) -> None:
    traced.trace.close()
    assert json.loads(traced.text)
    assert read(tmp_path, traced.text) == traced.records


@pytest.mark.parametrize("damage", ["{", "no event,", "7,", '{"name": "step", "ph": "X"},', '{"ph": "X"},'])
def test_a_broken_line_is_named(traced: Traced, tmp_path: Path, damage: str) -> None:
    lines = traced.text.splitlines()
    lines[4] = damage
    with pytest.raises(LoadTestError, match=r"trace\.json\.gz, line 5: "):
        read(tmp_path, "\n".join(lines) + "\n")


def test_a_trace_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match=r"none\.json\.gz cannot be read: .*No such file"):
        read_trace(tmp_path / "none.json.gz", 0.0)
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b"[\n" * 1000)[:-12])
    with pytest.raises(LoadTestError, match=r"cut\.json\.gz cannot be read"):
        read_trace(tmp_path / "cut.json.gz", 0.0)


# -- what is drawn -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "kind"),
    [
        (share(0, "a", 5), "prefill"),
        (share(0, "a", 1, samples=False), "prefill"),
        (share(0, "a", 1), "decode"),
        (share(0, "a", 4, drafted=3), "decode"),
        (share(0, "a", 4, drafted=2), "prefill"),
        (share(0, "a", 1, padding=True), "padding"),
    ],
)
def test_the_kind_of_work_of_a_share(one: ShareRecord, kind: str) -> None:
    assert [bar.work for bar in bars([step(0.0, one)])] == [kind]


def test_a_static_batch_bar_by_bar() -> None:
    """Two requests of one and three tokens, whose rows are computed until the longer one ends; then another one."""
    steps = [
        step(0.0, share(0, "a", 4), share(1, "b", 2)),
        step(1.5, share(0, "a", padding=True), share(1, "b")),
        step(3.0, share(0, "a", padding=True), share(1, "b")),
        step(9.0, share(0, "c", 3)),
    ]
    assert list(bars(steps)) == [
        Bar(0, "a", "prefill", 0.0, 1.5),
        Bar(0, "a", "padding", 1.5, 4.0),
        Bar(0, "c", "prefill", 9.0, 10.0),
        Bar(1, "b", "prefill", 0.0, 1.5),
        Bar(1, "b", "decode", 1.5, 4.0),
    ]


def test_a_request_that_pauses_keeps_its_row() -> None:
    steps = [step(0.0, share(0, "a")), step(1.0, share(1, "b")), step(2.0, share(0, "a"))]
    assert [(bar.request_id, bar.start, bar.end) for bar in bars(steps)] == [("a", 0.0, 3.0), ("b", 1.0, 2.0)]


def test_a_request_that_takes_the_row_of_another_at_once_has_a_bar_of_its_own() -> None:
    found = bars([step(0.0, share(0, "a")), step(2.0, share(0, "b"))])
    assert list(found) == [Bar(0, "a", "decode", 0.0, 1.0), Bar(0, "b", "decode", 2.0, 3.0)]


def test_bars_cover_the_steps_rows_and_nothing_twice() -> None:
    run = make_run("static")
    found = list(bars(run.steps))
    for one in run.steps:
        middle = one.start + one.seconds / 2
        there = sorted((bar.row, bar.request_id) for bar in found if bar.start <= middle < bar.end)
        assert there == [(each.row, each.request_id) for each in one.shares]
