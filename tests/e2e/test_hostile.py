"""Nobody can stop the server: hostile requests, a slow reader, a template without an end, an engine short of memory.

Everybody else is answered as if nothing were.
"""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.checkpoints import cycle_text
from tests.e2e.conftest import StartServer
from tests.e2e.harness import PATIENCE, Server, Waiting
from tests.hostile.attacks import KEY
from tests.hostile.driver import Siege

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
QUIET: dict[str, Any] = {"prompt": "Z", "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, cycle_folder: Path) -> Iterator[Server]:
    options = ("--num-blocks", "2048", "--client-timeout-seconds", "10", "--max-model-len", "2048")
    server = Server(tmp_path_factory.mktemp("server"), "--model", str(cycle_folder), "--api-keys", KEY, *options)
    server.http.headers["authorization"] = f"Bearer {KEY}"
    yield server.wait_ready()
    server.close()


@pytest.mark.parametrize("seeds", [range(150), pytest.param(range(150, 400), marks=pytest.mark.long)], ids=str)
def test_hostile_requests_are_answered_and_nobody_else_notices(server: Server, seeds: range) -> None:
    """`python -m tests.hostile N` sends more."""
    engine = server.engine_pid()
    siege = Siege(server.port)
    asyncio.run(siege.run(seeds))
    assert {0, 200, 400, 401, 404} <= siege.statuses.keys()
    assert server.engine_pid() == engine
    assert "Traceback" not in server.log
    server.wait_idle()


def test_a_client_that_does_not_read_delays_nobody(server: Server) -> None:
    """It asks for 270,000 alternatives, of which it reads a part and then nothing."""
    asked = {"prompt": "Z", "ignore_eos": True, "stream": True, "n": 64, "max_tokens": 200, "logprobs": 20}
    body = json.dumps(asked).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n"
    before, _ = server.memory()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(PATIENCE)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        said = slow.recv(1024)
        server.until("all of it is computed", lambda: server.metric("num_requests_running") == 0)
        assert server.text(**QUIET, max_tokens=50) == cycle_text(50)
        assert server.memory()[0] < before + 150, "what waits for the client is bounded"
        for _ in range(20):
            said += slow.recv(1024)
        assert said.count(b"data: ") > 1
        while b"[DONE]" not in said[-100:]:
            said += slow.recv(1 << 20)
    assert b'"code":"slow_client"' in said[-1000:]


def test_a_template_without_an_end_stops_nobody(start: StartServer, cycle_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(cycle_folder, tmp_path / "model")
    loops = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    (folder / "chat_template.jinja").write_text(f"{{% if messages[0].name %}}{loops}{{% endif %}}Z")
    server = start("--model", str(folder)).wait_ready()
    waiting = Waiting(server, CHAT, messages=[{"role": "user", "content": "Z", "name": "loops"}], max_tokens=1)
    while waiting.is_alive():
        assert server.get("/health").status_code == 200
        assert server.text(**QUIET, max_tokens=5) == cycle_text(5)
    answer = waiting.answer()
    assert answer.status_code == 400
    assert "the chat template of the model takes more than 2 s" in answer.json()["error"]["message"]
    for _ in range(2):
        answer = server.chat("Z", temperature=0, max_tokens=5, ignore_eos=True)
        assert answer["choices"][0]["message"]["content"] == cycle_text(5)


def test_a_step_that_lacks_memory_fails_with_its_request(start: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine may grow by 2 MiB, which is enough for Python and too little for the arrays of 4,096 tokens."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")  # so that no memory that was freed takes their place
    server = start("--max-num-batched-tokens", "4096", "--max-chunk-tokens", "4096").wait_ready()
    engine = server.engine_pid()
    with server.streaming(COMPLETIONS, **QUIET, max_tokens=4000) as stream:
        said = next(stream)["choices"][0]["text"]
        limits = resource.prlimit(engine, resource.RLIMIT_AS)
        size = psutil.Process(engine).memory_info().vms + 2 * 1024 * 1024
        resource.prlimit(engine, resource.RLIMIT_AS, (size, limits[1]))
        refused = server.post(COMPLETIONS, prompt=[5] * 5000, max_tokens=1)
        assert refused.status_code == 500
        assert "MemoryError: there is not enough memory" in refused.json()["error"]["message"]
        resource.prlimit(engine, resource.RLIMIT_AS, limits)
        assert server.complete([5] * 5000, max_tokens=1)["usage"]["completion_tokens"] == 1
        said += "".join(event["choices"][0]["text"] for event in stream)
    assert said == cycle_text(4000)
    assert server.engine_pid() == engine
