"""A test run that is told to end does so at once, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.harness import PATIENCE, command_line

ROOT = Path(__file__).parents[2]
# A server with its engine, and a process that has lost its parent.
INTERRUPTED = """
import subprocess, time
from pathlib import Path
from tests.e2e.harness import Server

def test_that_never_ends(tmp_path):
    orphan = subprocess.run("sleep 1000 >&- 2>&- & echo $!", shell=True, capture_output=True, text=True).stdout
    server = Server(tmp_path).wait_ready()
    Path("pids.new").write_text(f"{orphan} {server.process.pid} {server.engine_pid()}")
    Path("pids.new").rename("pids")
    with server.streaming("/v1/completions", prompt="Z", ignore_eos=True, max_tokens=1000) as stream:
        next(stream)
        time.sleep(1000)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found by Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_ends_the_run_and_all_that_it_started(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "test_interrupted.py").write_text(INTERRUPTED)
    options = ["-c", ROOT / "pyproject.toml", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    with (tmp_path / "log").open("wb") as log:
        run = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, "test_interrupted.py"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])},
            stdout=log,
            stderr=log,
        )
    pids = tmp_path / "pids"
    deadline = time.monotonic() + PATIENCE
    while not pids.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert pids.exists(), (tmp_path / "log").read_text()
    run.send_signal(number)
    assert run.wait(PATIENCE) == pytest.ExitCode.INTERRUPTED, (tmp_path / "log").read_text()
    assert not any(map(command_line, map(int, pids.read_text().split())))
