"""Traces are read back as what happened, whole or broken off."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.loadtest.errors import TraceError
from shoal.loadtest.steps import EngineRequest, Row, Step, answer_id, read_events, read_trace
from shoal.server.engine.chrome_trace import ChromeTrace
from tests.fakes import Harness


class Traced(Harness):
    """An engine whose steps start at whole seconds and take the parts of one that a clock says.

    Args:
        path: of the trace.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(max_num_seqs=3, num_blocks=8)
        self.path = path
        self.trace = ChromeTrace(path)
        self.engine.observers = [self.trace]
        self.engine.clock = self._clock
        self._num_reads = 0

    def _clock(self) -> float:
        """A quarter for each part of a step."""
        self._num_reads += 1
        return self.now + (self._num_reads - 1) % 4 / 4

    @property
    def text(self) -> str:
        """All of the trace so far."""
        return self.path.read_text()

    def read(self) -> tuple[list[Step], dict[str, EngineRequest]]:
        return read_events(self.text.splitlines(keepends=True), "trace")


@pytest.fixture
def traced(tmp_path: Path) -> Traced:
    """`x` waits for a row, `y` is aborted, and `z` is still in the batch."""
    harness = Traced(tmp_path / "trace.json")
    for request_id, max_tokens in (("w", 1), ("y", 9), ("z", 9), ("x", 2)):
        harness.add(f"{request_id}-0-0", [1, 2, 3, 4, 5], max_tokens=max_tokens)
    harness.step()
    harness.step()
    harness.take(harness.scheduler.abort("y-0-0"))
    harness.step()
    return harness


def test_steps_and_requests_are_read_back(traced: Traced) -> None:
    steps, requests = traced.read()
    assert [step.start for step in steps] == [0.0, 1.0, 2.0]
    assert {(step.seconds, step.execute_seconds) for step in steps} == {(0.75, 0.25)}
    assert steps[1] == Step(
        start=1.0,
        seconds=0.75,
        execute_seconds=0.25,
        rows=[
            Row("y", 1, 1, 0, samples=True, is_padding=False),
            Row("z", 2, 1, 0, samples=True, is_padding=False),
            Row("x", 0, 1, 0, samples=True, is_padding=False),
        ],
        num_waiting=0,
        num_blocks=8,
        num_used_blocks=6,
        num_kv_tokens=6 + 6 + 5,
        num_pairs=6 + 6 + 5,
        num_keys=6 + 6 + 5,
        num_preemptions=0,
    )
    assert requests == {
        "w": EngineRequest("w", 0.0, 0.0, 0.75),
        "y": EngineRequest("y", 0.0, 0.0, 1.75),
        "z": EngineRequest("z", 0.0, 0.0, None),
        "x": EngineRequest("x", 0.0, 1.0, 2.75),
    }


def test_a_trace_may_be_broken_off_anywhere(traced: Traced) -> None:
    steps, _ = traced.read()
    numbers = set()
    text = traced.text
    for end in range(len(text) + 1):
        found, requests = read_events(text[:end].splitlines(keepends=True), "trace")
        assert found == steps[: len(found)]
        assert {row.request_id for step in found for row in step.rows} == requests.keys()
        numbers.add(len(found))
    assert numbers == {0, 1, 2, 3}


def test_a_closed_array_is_read_too(traced: Traced) -> None:
    found = traced.read()
    traced.trace.close()
    assert traced.text.endswith("}\n]\n")
    assert traced.read() == found


@pytest.mark.parametrize("damage", ["{", "no event,", "7,", '{"name": "step", "ph": "X"},', '{"ph": "X"},'])
def test_a_broken_line_is_named(traced: Traced, tmp_path: Path, damage: str) -> None:
    lines = traced.text.splitlines()
    lines[4] = damage
    path = tmp_path / "trace.json"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(TraceError, match=r"trace\.json, line 5: not an event of a step trace"):
        read_trace(path)


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot read the trace .*none\.json: No such file"):
        read_trace(tmp_path / "none.json")


def test_requests_of_one_choice_have_the_id_of_their_answer() -> None:
    assert answer_id("chatcmpl-0a1b-0-0") == "chatcmpl-0a1b"
    assert [answer_id(name) for name in ("cmpl-0a1b-0-1", "cmpl-0a1b-1-0")] == ["cmpl-0a1b-0-1", "cmpl-0a1b-1-0"]
