"""A server process that is started, found ready, quoted and ended, whatever it does."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
import pytest

from shoal.testing import ServerFailedError, ServerProcess

HEALTHY = """
import sys, signal
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

%s
HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


def process(tmp_path: Path, script: str) -> ServerProcess:
    return ServerProcess([], tmp_path / "log", command=(sys.executable, "-c", script))


def test_a_server_is_ready_in_its_block_and_ended_after_it(tmp_path: Path) -> None:
    with process(tmp_path, HEALTHY % "") as server:
        assert server.fetch("health").is_success
        server.check()
        assert server.cpu_seconds() == (0.0, 0.0), "there is no engine"
    with pytest.raises(ServerFailedError, match="by signal SIGTERM"):
        server.check()


def test_a_server_that_no_longer_answers_is_quoted(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerFailedError, match="the server does not answer: "),
        process(tmp_path, HEALTHY % "") as server,
    ):
        httpx.get(server.url.replace(str(server.port), "1"))


def test_a_server_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.testing.server.END_SECONDS", 0.1)
    with process(tmp_path, HEALTHY % "signal.signal(signal.SIGTERM, signal.SIG_IGN)") as server:
        pass
    with pytest.raises(ServerFailedError, match="by signal SIGKILL"):
        server.check()


def test_a_server_that_ends_at_once_is_quoted(tmp_path: Path) -> None:
    script = "import sys; print('shoal serve: no such model'); sys.exit(2)"
    with (
        pytest.raises(ServerFailedError, match=r"(?s)exit code 2; the last lines of its log:.*no such model"),
        process(tmp_path, script),
    ):
        pass


def test_a_server_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    server = process(tmp_path, "import time; time.sleep(60)")
    with pytest.raises(ServerFailedError, match=r"not ready after 0.2 s; its log is empty"):
        server.wait_ready(0.2)
    server.kill()
