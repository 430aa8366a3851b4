"""Engines die under streams, which go on: each ends as it would have undisturbed, to the bit."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import StartServer
from tests.e2e.harness import Server, Waiting

COMPLETIONS, RESTARTS = "/v1/completions", "shoal:engine_restarts_total"
BODIES: list[dict[str, Any]] = [
    {"prompt": "def add(a, b):\n", "max_tokens": 150, "temperature": 0, "logprobs": 3},
    {"prompt": "import os\n", "max_tokens": 130, "n": 2, "logprobs": 0, "presence_penalty": 0.5},
    {"prompt": "class Stack:\n" * 30, "max_tokens": 120, "echo": True, "logprobs": 2},
    {"prompt": "for x in range(", "max_tokens": 150, "stop": ["zebra", "return x"], "repetition_penalty": 1.1},
    {"prompt": ["if ", "while "], "max_tokens": 100, "min_tokens": 100, "logit_bias": {"40": 2}},
]


def whole(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    """All that a stream says, in a form in which it does not matter how its events were cut."""
    said: dict[str, Any] = {}
    options = {"seed": 7, "ignore_eos": True, "stream_options": {"include_usage": True}}
    for event in server.stream(COMPLETIONS, **options | body):
        assert "error" not in event, event
        for choice in event["choices"]:
            own = said.setdefault(str(choice["index"]), {"text": "", "reason": None})
            own["text"] += choice["text"]
            own["reason"] = choice["finish_reason"] or own["reason"]
            for name, values in (choice["logprobs"] or {}).items():
                own.setdefault(name, []).extend(values)
        if event["usage"]:
            said["usage"] = {name: count for name, count in event["usage"].items() if isinstance(count, int)}
    return said


@contextlib.contextmanager
def streams_as_undisturbed(server: Server) -> Iterator[None]:
    """Streams that come anew until the block ends, however fast the server is; all say what they said before it."""
    undisturbed = [whole(server, body) for body in BODIES]
    is_over = threading.Event()

    def stream_until_over(body: dict[str, Any]) -> list[dict[str, Any]]:
        said = [whole(server, body)]
        while not is_over.is_set():
            said.append(whole(server, body))
        return said

    with ThreadPoolExecutor(len(BODIES)) as pool:
        streams = [pool.submit(stream_until_over, body) for body in BODIES]
        try:
            yield
        finally:
            is_over.set()
        for stream, expected in zip(streams, undisturbed, strict=True):
            assert all(said == expected for said in stream.result())
    assert server.metric("request_success_total", finished_reason="error") == 0


@pytest.mark.parametrize("options", [(), ("--standby", "--speculation", "suffix", "--num-blocks", "120")])
def test_streams_outlive_their_engines(tmp_path: Path, options: tuple[str, ...]) -> None:
    server = Server(tmp_path, *options)
    try:
        server.wait_ready()
        with streams_as_undisturbed(server):
            for number, how in enumerate((signal.SIGKILL, signal.SIGSEGV, signal.SIGKILL), 1):
                tokens = server.metric("generation_tokens_total")
                server.until("it works", lambda tokens=tokens: server.metric("generation_tokens_total") > tokens + 60)
                os.kill(server.engine_pid(), how)
                server.until("another engine", lambda n=number: server.metric(RESTARTS) == n)
        assert server.metric("shoal:requests_resumed_total") > 0
    finally:
        server.close()


def test_an_engine_that_is_stopped_is_replaced(start: StartServer) -> None:
    server = start("--hang-seconds", "0.5").wait_ready()
    engine = server.engine_pid()
    os.kill(engine, signal.SIGSTOP)
    time.sleep(1)
    assert server.get("/health").status_code == 200  # nothing is asked of it
    waiting = Waiting(server, COMPLETIONS, prompt="Z", temperature=0, ignore_eos=True, max_tokens=40)
    server.until("it is not healthy", lambda: server.get("/health").status_code == 503)
    assert waiting.answer().status_code == 200
    assert server.engine_pid() != engine
    assert server.get("/ready").status_code == server.get("/health").status_code == 200
