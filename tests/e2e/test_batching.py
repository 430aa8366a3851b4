"""Many requests at once: one batch, one queue, blocks that come back."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from itertools import islice
from typing import Any

import httpx
import pytest

from tests.e2e.checkpoints import cycle_text
from tests.e2e.conftest import API_KEYS
from tests.e2e.harness import PATIENCE, Server, events, joined

COMPLETIONS = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "Z", "temperature": 0, "ignore_eos": True, "max_tokens": 12_000}


def test_thirty_streams_run_in_one_batch_with_the_texts_that_each_has_alone(main: Server) -> None:
    """Every fifth text is compared."""
    bodies: list[dict[str, Any]] = [
        {"prompt": f"def function_{i}(a, b):" + " #" * (i % 7), "max_tokens": 160 + i % 5, "ignore_eos": True}
        | ({"temperature": 0} if i % 2 else {"temperature": 0.8, "seed": i})
        for i in range(30)
    ]
    alone = {i: main.text(**bodies[i]) for i in range(0, 30, 5)}
    running: list[float] = []

    async def one(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        async with client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as response:
            lines = [line async for line in response.aiter_lines()]
        return joined(list(events(iter(lines))))

    async def watch(client: httpx.AsyncClient) -> None:
        while True:
            text = (await client.get("/metrics")).text
            running.extend(
                float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:num_requests_running")
            )
            await asyncio.sleep(0.03)

    async def all_at_once() -> list[str]:
        async with httpx.AsyncClient(base_url=main.url, timeout=PATIENCE, trust_env=False) as client:
            watching = asyncio.create_task(watch(client))
            texts = await asyncio.gather(*(one(client, body) for body in bodies))
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            return texts

    together = asyncio.run(all_at_once())
    assert max(running) == 30
    assert {i: together[i] for i in alone} == alone
    main.wait_idle()


def leave_stream(server: Server) -> None:
    with server.streaming(COMPLETIONS, **LONG) as stream:
        next(stream)
        assert server.metric("num_requests_running") >= 1
        assert server.metric("kv_cache_usage_perc") > 0


def leave_before_the_answer(server: Server) -> None:
    """Give up a request that is not streamed, once it runs."""
    with raw_request(server, **LONG):
        server.until("it runs beside the other", lambda: server.metric("num_requests_running") == 2)


@pytest.mark.parametrize("leave", [leave_stream, leave_before_the_answer])
def test_a_client_that_leaves_gives_row_and_blocks_back(strict: Server, leave: Callable[[Server], None]) -> None:
    """Two requests may run at a time, so a third one is served beside the first only if the second has ended."""
    aborted = strict.metric("request_success_total", finished_reason="abort")
    with strict.streaming(COMPLETIONS, **LONG) as first:
        chunks = [next(first)]
        leave(strict)
        assert strict.text("Z", temperature=0, max_tokens=5) == cycle_text(5)
        strict.until("only the first request runs", lambda: strict.metric("num_requests_running") == 1)
        chunks += islice(first, 2000)
    assert cycle_text(LONG["max_tokens"]).startswith(joined(chunks).removesuffix("\ufffd"))
    strict.wait_idle()
    assert strict.metric("request_success_total", finished_reason="abort") == aborted + 2


def raw_request(server: Server, **body: Any) -> socket.socket:
    """A connection on which a whole request was sent and nothing is read."""
    raw = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {API_KEYS[0]}\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
    return connection


def test_clients_that_leave_at_once_leave_nothing_behind(strict: Server) -> None:
    for i in range(20):
        raw_request(strict, **LONG, stream=i % 2 == 0).close()
    strict.wait_idle()
    assert strict.text("Z", temperature=0, max_tokens=11) == cycle_text(11)


def test_a_full_queue_refuses_at_once_and_a_waiting_request_may_leave(strict: Server) -> None:
    with strict.streaming(COMPLETIONS, **LONG) as first, strict.streaming(COMPLETIONS, **LONG) as second:
        next(first), next(second)
        with raw_request(strict, **LONG):
            strict.until("one waits", lambda: strict.metric("num_requests_waiting") == 1)
            for stream in (False, True):
                response = strict.post(COMPLETIONS, prompt="Z", stream=stream)
                assert response.status_code == 429
                assert int(response.headers["retry-after"]) >= 1
                error = response.json()["error"]
                assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
                assert "max_num_seqs 2 + max_num_waiting 1" in error["message"]
        strict.until("no request waits", lambda: strict.metric("num_requests_waiting") == 0)
        assert strict.metric("num_requests_running") == 2
    strict.wait_idle()


def test_more_requests_than_the_server_holds_are_refused_for_good(strict: Server) -> None:
    for prompt, n, param in (("Z", 4, "n"), (["Z"] * 4, 1, "prompt"), (["Z"] * 2, 2, "prompt")):
        response = strict.post(COMPLETIONS, prompt=prompt, n=n)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        assert "at most 3 at once" in response.json()["error"]["message"]
