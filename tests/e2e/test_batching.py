"""Many requests at once: one batch, one queue, blocks that come back."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import pytest

from tests.e2e.checkpoints import cycle_text
from tests.e2e.conftest import API_KEYS
from tests.e2e.harness import PATIENCE, Server, events, joined

COMPLETIONS = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "Z", "temperature": 0, "ignore_eos": True, "max_tokens": 3000}


def test_thirty_streams_run_in_one_batch_and_each_as_if_it_were_alone(main: Server) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": f"def function_{i}(a, b):" + " #" * (i % 7), "max_tokens": 32 + i % 5, "ignore_eos": True}
        | ({"temperature": 0} if i % 2 else {"temperature": 0.8, "seed": i})
        for i in range(30)
    ]
    alone = [main.text(**body) for body in bodies]
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
            await asyncio.sleep(0.01)

    async def all_at_once() -> list[str]:
        async with httpx.AsyncClient(base_url=main.url, timeout=PATIENCE, trust_env=False) as client:
            watching = asyncio.create_task(watch(client))
            texts = await asyncio.gather(*(one(client, body) for body in bodies))
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            return texts

    together = asyncio.run(all_at_once())
    assert max(running) == 30
    different = [i for i in range(30) if together[i] != alone[i]]
    assert not different
    main.wait_idle()


def leave_stream(server: Server) -> None:
    with server.streaming(COMPLETIONS, **LONG) as stream:
        next(stream)
        assert server.metric("num_requests_running") >= 1
        assert server.metric("kv_cache_usage_perc") > 0


def leave_before_the_answer(server: Server) -> None:
    """Give up a request that is not streamed, once it runs."""
    with pytest.raises(httpx.ReadTimeout):
        server.http.post(COMPLETIONS, json=LONG, timeout=0.5)


@pytest.mark.parametrize("leave", [leave_stream, leave_before_the_answer])
def test_who_leaves_gives_the_blocks_back(strict: Server, leave: Any) -> None:
    aborted = strict.metric("request_success_total", finished_reason="abort")
    with strict.streaming(COMPLETIONS, **LONG | {"max_tokens": 1500}) as other:
        first = next(other)
        leave(strict)
        strict.until("only the other runs", lambda: strict.metric("num_requests_running") == 1)
        assert joined([first, *other]) == cycle_text(1500)
    strict.wait_idle()
    assert strict.metric("request_success_total", finished_reason="abort") == aborted + 1


def test_a_full_queue_refuses_at_once_and_who_waits_may_leave(strict: Server) -> None:
    with strict.streaming(COMPLETIONS, **LONG) as first, strict.streaming(COMPLETIONS, **LONG) as second:
        next(first), next(second)
        with httpx.Client(base_url=strict.url, timeout=PATIENCE, trust_env=False) as client:
            client.headers["authorization"] = f"Bearer {API_KEYS[0]}"

            def wait_in_queue() -> None:
                with pytest.raises(httpx.TransportError):
                    client.post(COMPLETIONS, json=LONG)

            waiting = threading.Thread(target=wait_in_queue)
            waiting.start()
            strict.until("one waits", lambda: strict.metric("num_requests_waiting") == 1)
            for options in ({}, {"stream": True}):
                response = strict.post(COMPLETIONS, prompt="Z", **options)
                assert response.status_code == 429
                assert int(response.headers["retry-after"]) >= 1
                error = response.json()["error"]
                assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
                assert "max_num_seqs 2 + max_num_waiting 1" in error["message"]
            abandon(client)
            waiting.join(PATIENCE)
        strict.until("nobody waits", lambda: strict.metric("num_requests_waiting") == 0)
        assert strict.metric("num_requests_running") == 2
    strict.wait_idle()
    # What can never fit is no matter of trying again.
    response = strict.post(COMPLETIONS, prompt="Z", n=4)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")
    response = strict.post(COMPLETIONS, prompt=["Z"] * 4)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert strict.text("Z", temperature=0, max_tokens=11) == cycle_text(11)


def abandon(client: httpx.Client) -> None:
    """Cut the connection of a request that another thread waits for."""
    for connection in client._transport._pool.connections:  # type: ignore[attr-defined]  # httpx has no call for this
        connection._connection._network_stream.get_extra_info("socket").shutdown(2)
