"""`shoal serve --engines N`: several engine processes as one server, of which any may die."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.conftest import StartServer
from tests.e2e.harness import Server
from tests.e2e.test_resumption import RESTARTS, streams_as_undisturbed


def engines(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.get("/server_info").json()["engines"]
    return found


def wait_ready(server: Server) -> Server:
    """Until all engines are: the server is ready with the first."""
    server.wait_ready()
    server.until("all are ready", lambda: all(one["is_ready"] for one in engines(server)))
    return server


def tokens(server: Server, engine: str) -> float:
    return server.metric("generation_tokens_total", engine=engine)


def test_streams_go_on_in_another_engine_to_the_bit(tmp_path: Path) -> None:
    server = Server(tmp_path, "--engines", "2")
    try:
        assert [one["engine"] for one in engines(wait_ready(server))] == ["0", "1"]
        with streams_as_undisturbed(server):
            for victim in ("0", "1"):  # the second has the requests of the first
                before = tokens(server, victim)
                server.until("it works", lambda v=victim, n=before: tokens(server, v) > n + 40)
                os.kill(engines(server)[int(victim)]["pid"], signal.SIGKILL)
            server.until("both are replaced", lambda: server.metric(RESTARTS) == 2)
        assert server.metric("shoal:requests_resumed_total") > 0
    finally:
        server.close()


def test_prompts_find_their_prefix(start: StartServer) -> None:
    server = wait_ready(start("--engines", "2"))
    prompts = ["A" * 64, "B" * 64, "C" * 64, "D" * 64]
    texts = [server.text(prompt, max_tokens=4, temperature=0) for prompt in prompts]
    for _ in range(2):
        for prompt, text in zip(prompts, texts, strict=True):
            answer = server.complete(prompt, max_tokens=4, temperature=0)
            assert answer["choices"][0]["text"] == text
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 48
    assert all(server.metric("prefix_cache_hits_total", engine=engine) > 0 for engine in "01")


def test_each_engine_tells_of_its_steps(start: StartServer) -> None:
    server = wait_ready(start("--engines", "2"))
    refused = server.get("/v1/engine/events", params={"engine": 2})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "engine")
    with server.http.stream("GET", "/v1/engine/events", params={"engine": 1}) as events:
        lines = events.iter_lines()
        while not next(lines).startswith("event: snapshot"):
            pass
        for prompt in ("A" * 32, "B" * 32):  # one of them goes there
            server.text(prompt, max_tokens=4)
        while not next(lines).startswith("event: step"):
            pass


def test_engines_share_the_cores_and_end_with_the_server(start: StartServer, tmp_path: Path) -> None:
    server = wait_ready(start("--engines", "2", "--trace", str(tmp_path / "steps.json")))
    pids = [one["pid"] for one in engines(server)]
    assert len({server.process.pid, *pids}) == 3
    assert "1 thread" in server.get("/server_info").json()["backend"]
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert not any(map(psutil.pid_exists, pids))
    assert (tmp_path / "steps-0.json").stat().st_size > 0
    assert (tmp_path / "steps-1.json").stat().st_size > 0


def test_settings_that_several_engines_cannot_have(start: StartServer) -> None:
    server = start("--engines", "2", "--pin-threads")
    assert server.wait() == 2
    assert "pin_threads is for one engine, not for engines = 2" in server.log
