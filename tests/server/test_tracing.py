"""The file of the step trace: begun anew by the server, gone on with by each of its engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.loadtest.steps import read_trace
from shoal.scheduler.errors import ConfigError
from shoal.server.engine.tracing import begin_trace, open_trace
from tests.fakes import Harness


def run_engine(path: Path, request_id: str) -> None:
    harness = Harness()
    harness.engine.observe = open_trace(path)
    harness.add(request_id, [1, 2, 3], max_tokens=2)
    harness.drain()
    assert harness.engine.observe is not None


def test_each_engine_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("of an earlier server")
    begin_trace(path)
    for request_id in "ab":
        run_engine(path, request_id)
        assert path.read_text().endswith(",\n"), "nothing is kept back"
    steps, requests = read_trace(path)
    assert [[row.request_id for row in step.rows] for step in steps] == [["a"], ["a"], ["b"], ["b"]]
    assert requests.keys() == {"a", "b"}
    assert path.read_text().count("[\n") == 1


@pytest.mark.parametrize("start", [begin_trace, open_trace])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, start: object) -> None:
    assert callable(start)
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "none" / "a.json", "No such file or directory")):
        with pytest.raises(ConfigError) as caught:
            start(path)
        assert caught.value.message == f"trace: cannot write {path}: {reason}"
        assert caught.value.param == "trace"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
def test_a_full_disk_ends_the_trace_and_not_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    run_engine(Path("/dev/full"), "a")
    assert [record.message for record in caplog.records] == [
        "the trace /dev/full ends here: No space left on device",
    ]
