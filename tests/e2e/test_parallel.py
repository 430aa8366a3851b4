"""One model over several processes, as its users start them: ranks that die are replaced, and streams go on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from shoal.testing.server import free_port
from tests.e2e.harness import SHOAL, Server, clean_environment, command_line, joined

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found by Linux's /proc")
ASKED = {"prompt": [5, 9, 11], "max_tokens": 80, "ignore_eos": True, "seed": 3}


def ranks(server: Server) -> list[int]:
    """The processes that compute beside engines, wherever on this machine."""
    pids = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    return [
        pid
        for pid in pids
        if b"shoal.server.engine.rank" in command_line(pid) and server.model.encode() in command_line(pid)
    ]


def disturb(server: Server, expected: str) -> None:
    """Kill a rank in the midst of a stream, and another one when nothing is to be done."""
    with server.streaming("/v1/completions", **ASKED) as stream:
        chunks = [next(stream), next(stream)]
        (pid,) = ranks(server)
        os.kill(pid, signal.SIGKILL)
        chunks += stream
    assert joined(chunks) == expected
    server.until("a new engine has a rank", lambda: ranks(server))
    server.wait_idle()
    (pid,) = ranks(server)
    os.kill(pid, signal.SIGKILL)
    server.until("its end is told", lambda: len(re.findall(r"rank 1 at \S+ has ended", server.log)) == 2)
    assert server.text(**ASKED) == expected


class ParallelServer(Server):
    """A server of the model at `folder / model`, by which its ranks are found."""

    def __init__(self, folder: Path, checkpoint: Path, *args: str) -> None:
        (folder / "model").symlink_to(checkpoint)
        self.model = str(folder / "model")
        super().__init__(folder, "--model", self.model, "--num-blocks", "2048", "--backend", "torch", *args)


@pytest.mark.long
def test_a_rank_that_dies(tmp_path: Path, tiny_folder: Path) -> None:
    server = ParallelServer(tmp_path, tiny_folder, "--tensor-parallel", "2").wait_ready()
    disturb(server, server.text(**ASKED))
    server.close()
    server.until("no rank is left", lambda: not ranks(server))


@pytest.mark.long
def test_ranks_that_join(tmp_path: Path, tiny_folder: Path) -> None:
    """The one that `shoal rank` keeps in being ends with each engine, and joins the next."""
    address = f"127.0.0.1:{free_port()}"
    server = ParallelServer(tmp_path, tiny_folder, "--pipeline-parallel", "2", "--parallel-address", address)
    joining = subprocess.Popen([SHOAL, "rank", address, "--model", server.model], env=clean_environment())
    try:
        server.wait_ready()
        disturb(server, server.text(**ASKED))
    finally:
        joining.terminate()
        joining.wait()
        server.close()
    server.until("no rank is left", lambda: not ranks(server))
