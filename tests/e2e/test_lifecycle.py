"""Engines die and servers are told to stop: every request gets an answer, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal.testing import ServerProcess
from tests.e2e.checkpoints import cycle_text
from tests.e2e.conftest import StartServer
from tests.e2e.harness import SHOAL, Server, Waiting, clean_environment, command_line, joined

LONG: dict[str, Any] = {"prompt": "Z", "temperature": 0, "ignore_eos": True}
COMPLETIONS = "/v1/completions"


def unavailable(server: Server) -> httpx.Response | None:
    """The answer to a new request, if it is a refusal with a time to try again."""
    response = server.post(COMPLETIONS, prompt="Z", max_tokens=1)
    if response.status_code != 503:
        return None
    assert response.json()["error"]["code"] == "engine_unavailable"
    assert int(response.headers["retry-after"]) >= 1
    return response


def nothing_left(server: Server) -> bool:
    return not list(server.temp.iterdir())


def test_a_server_that_starts_refuses_and_one_that_drains_does_not_lose_its_streams(start: StartServer) -> None:
    server = start("--drain-seconds", "280")
    engine = server.engine_pid()
    os.kill(engine, signal.SIGSTOP)  # else it may be ready when the server can first answer
    assert server.until("it answers before it is ready", lambda: server.get("/health")).status_code == 503
    assert unavailable(server)
    os.kill(engine, signal.SIGCONT)
    server.wait_ready()

    # A terminal or a service manager may signal the whole process group: it must drain all the same.
    with server.streaming(COMPLETIONS, **LONG, max_tokens=6000) as stream:
        chunks = [next(stream)]
        os.killpg(server.process.pid, signal.SIGTERM)
        server.until("new requests are refused", lambda: unavailable(server))
        assert server.get("/health").status_code == 503
        os.kill(server.engine_pid(), signal.SIGKILL)
        chunks += stream
    assert joined(chunks) == cycle_text(6000)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert server.wait() == 0
    assert nothing_left(server)


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGINT],
        pytest.param([signal.SIGINT] * 2, marks=pytest.mark.long),
        [signal.SIGTERM] * 2,
        [signal.SIGHUP, signal.SIGTERM],
    ],
    ids=["time limit", "interrupts", "terminations", "hang-up"],
)
def test_a_drain_ends(start: StartServer, signals: list[signal.Signals]) -> None:
    server = start("--drain-seconds", "0.2" if len(signals) == 1 else "280").wait_ready()
    engine = server.engine_pid()
    waiting = Waiting(server, COMPLETIONS, **LONG, max_tokens=12_000)
    server.until("it runs", lambda: server.metric("num_requests_running") == 1)
    with server.streaming(COMPLETIONS, **LONG, max_tokens=12_000) as stream:
        next(stream)
        server.signal(signals[0])
        for another in signals[1:]:
            server.until("it drains", lambda: unavailable(server))
            server.signal(another)
        chunks = list(stream)
    assert (chunks[-1]["error"]["type"], chunks[-1]["error"]["code"]) == ("server_error", "engine_unavailable")
    assert waiting.answer().status_code == 503
    assert server.wait() == 0
    assert not command_line(engine)
    assert nothing_left(server)


@pytest.mark.parametrize("signals", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_client_that_never_reads_does_not_keep_a_server_from_its_end(start: StartServer, signals: int) -> None:
    server = start("--drain-seconds", "0.2" if signals == 1 else "280").wait_ready()
    asked = LONG | {"max_tokens": 4000, "stream": True, "logprobs": 20}
    whole = LONG | {"max_tokens": 600, "n": 8, "logprobs": 20}
    with contextlib.ExitStack() as unread:
        for body in (asked, whole):
            content = json.dumps(body).encode()
            client = unread.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n"
            client.sendall(head.encode() + content)
        server.until("all is computed", lambda: server.metric("generation_tokens_total") > 8 * 600)
        server.until("it waits for them", lambda: server.metric("num_requests_running") == 0)
        waiting = Waiting(server, COMPLETIONS, **LONG, max_tokens=16_000)
        server.until("it runs", lambda: server.metric("num_requests_running") == 1)
        for number in range(signals):
            server.until("it drains", lambda number=number: number == 0 or unavailable(server))
            server.signal(signal.SIGTERM)
        assert waiting.answer().status_code in (200, 503)
        assert server.wait() == 0
    assert "Traceback" not in server.log
    assert "shutdown exceeded" not in server.log


@pytest.mark.parametrize("delay", [0.0, 0.2, pytest.param(0.1, marks=pytest.mark.long)])
def test_a_server_may_be_stopped_at_any_moment_of_its_start(start: StartServer, delay: float) -> None:
    server = start()
    server.until("it answers", lambda: server.get("/health").status_code in (200, 503))
    time.sleep(delay)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert "Traceback" not in server.log
    assert nothing_left(server)


def test_a_server_may_be_stopped_before_it_answers(start: StartServer) -> None:
    server = start()
    server.engine_pid()  # is launched before the rest is loaded
    server.signal(signal.SIGTERM)
    assert server.wait() in (-signal.SIGTERM, 0)  # 0 if it came so far that it drains
    server.until("its engine ends too, and removes what is left", lambda: nothing_left(server))
    assert "Traceback" not in server.log


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="this system schedules no batch jobs")
def test_the_server_gives_way_to_its_engines(start: StartServer) -> None:
    server = start().wait_ready()
    assert os.sched_getscheduler(server.process.pid) == os.SCHED_BATCH
    first = server.engine_pid()
    assert os.sched_getscheduler(first) == os.SCHED_OTHER
    os.kill(first, signal.SIGKILL)
    server.until("there is another engine", lambda: server.engine_pid() != first)
    second = server.engine_pid()
    server.until("it does not give way", lambda: os.sched_getscheduler(second) == os.SCHED_OTHER)


def test_an_engine_ends_with_its_server(start: StartServer) -> None:
    server = start().wait_ready()
    engine = server.engine_pid()
    with server.streaming(COMPLETIONS, **LONG, max_tokens=12_000) as stream:
        next(stream)
        server.signal(signal.SIGKILL)
        with pytest.raises((httpx.TransportError, AssertionError)):
            list(stream)
    server.wait()
    server.until("the engine has ended", lambda: not command_line(engine))
    server.until("nothing is left", lambda: nothing_left(server))


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", pytest.param("<&-", marks=pytest.mark.long)])
def test_a_server_may_be_started_without_standard_files(tmp_path: Path, closed: str) -> None:
    shell = ("sh", "-c", f'exec {SHOAL} serve "$@" {closed}', "sh")
    with ServerProcess([], tmp_path / "log", command=shell, environment=clean_environment()) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_server_that_may_open_too_few_files_says_so() -> None:
    command = ["sh", "-c", f"ulimit -n 24; exec {SHOAL} serve"]
    ended = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), check=False)
    assert ended.returncode == 2
    assert "may open 24 files, but a server needs at least 128: raise the limit" in ended.stderr
