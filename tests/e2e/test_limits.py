"""What a key may ask, and what time a request has, at a real server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import psutil
import pytest

from tests.e2e.checkpoints import cycle_text
from tests.e2e.harness import Server

COMPLETIONS = "/v1/completions"
KEYS = ("one", "two", "three", "four", "five")
LONG: dict[str, Any] = {"prompt": "Z", "temperature": 0, "ignore_eos": True, "max_tokens": 12_000}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, cycle_folder: Any) -> Iterator[Server]:
    """A server with limits for a key; each test has a key of its own."""
    limits = ("--key-max-requests=4", "--key-requests-per-minute=6", "--key-tokens-per-minute=100000")
    one = Server(
        tmp_path_factory.mktemp("server"),
        *("--model", str(cycle_folder), "--num-blocks", "2048", f"--api-keys={','.join(KEYS)}"),
        *limits,
    )
    yield one.wait_ready()
    one.close()


def with_key(server: Server, key: str) -> dict[str, Any]:
    return {"headers": {"authorization": f"Bearer {key}"}}


def client(server: Server, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def ask(server: Server, key: str, **body: Any) -> Any:
    return server.http.post(COMPLETIONS, json={"prompt": "Z", "temperature": 0, **body}, **with_key(server, key))


def test_a_key_may_ask_so_much_a_minute_and_others_are_not_concerned(server: Server) -> None:
    """As OpenAI's client sees it."""
    raw = client(server, "one").completions.with_raw_response.create(model=server_model(server), prompt="Z", n=4)
    assert raw.headers["x-ratelimit-limit-requests"] == "6"
    assert raw.headers["x-ratelimit-remaining-requests"] == "2"
    assert 1 <= int(raw.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 40
    usage = raw.parse().usage
    assert usage is not None
    assert raw.headers["x-ratelimit-limit-tokens"] == "100000"
    left = int(raw.headers["x-ratelimit-remaining-tokens"])
    assert 100_000 - usage.total_tokens <= left <= 100_000, "what was not needed was given back"
    with pytest.raises(openai.RateLimitError) as caught:
        client(server, "one").completions.create(model=server_model(server), prompt=["Z", "Z", "Z", "Z"])
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 20
    assert int(caught.value.response.headers["x-ratelimit-remaining-requests"]) >= 2, "it took nothing"
    assert ask(server, "two").status_code == 200


def server_model(server: Server) -> str:
    name: str = server.get("/v1/models", **with_key(server, KEYS[0])).json()["data"][0]["id"]
    return name


def test_every_answer_of_a_completion_says_what_is_left(server: Server) -> None:
    names = [
        f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")
    ]
    bad = ask(server, "three", temperature=9)
    missing = ask(server, "three", model="other")
    refused = ask(server, "three", n=5)
    assert (bad.status_code, missing.status_code, refused.status_code) == (400, 404, 400)
    assert "at most 4 unfinished" in refused.json()["error"]["message"]
    with server.http.stream(
        "POST", COMPLETIONS, json={"prompt": "Z", "stream": True, "max_tokens": 3}, **with_key(server, "three")
    ) as stream:
        stream.read()
    for answer in (bad, missing, refused, stream):
        assert [name for name in names if name not in answer.headers] == []
    assert stream.headers["x-ratelimit-remaining-requests"] == "5"
    others = (server.get("/v1/models", **with_key(server, "three")), ask(server, "unknown"))
    assert [answer.status_code for answer in others] == [200, 401]
    for answer in others:
        assert not [name for name in names if name in answer.headers]


def test_a_key_may_have_so_many_unfinished(server: Server) -> None:
    engine = psutil.Process(server.engine_pid())
    with ThreadPoolExecutor() as pool:
        engine.suspend()  # so that nothing is finished, however long this takes
        try:
            four = pool.submit(ask, server, "four", n=4)
            left = "x-ratelimit-remaining-requests"
            server.until("the key has four", lambda: ask(server, "four", temperature=9).headers[left] == "2")
            answer = ask(server, "four")
        finally:
            engine.resume()
    assert four.result().status_code == 200
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert "key_max_requests" in answer.json()["error"]["message"]
    assert server.metric("shoal:requests_refused_total", code="rate_limit_exceeded") >= 1
    server.wait_idle()
    assert ask(server, "four").status_code == 200


def test_a_request_whose_time_has_run_out_ends_and_leaves_nothing(server: Server) -> None:
    answer = server.http.post(
        COMPLETIONS,
        json={**LONG, "timeout": 5},
        headers={**with_key(server, "five")["headers"], "x-request-timeout": "0.3"},
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (408, "timeout_error", "timeout")
    assert "in its timeout of 0.3 s" in error["message"]
    body = {**LONG, "timeout": 0.3, "stream": True}
    with server.http.stream("POST", COMPLETIONS, json=body, **with_key(server, "five")) as stream:
        assert stream.status_code == 200
        lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]" and '"code":"timeout"' in lines[-2]
    server.wait_idle()
    assert ask(server, "five", max_tokens=5, timeout=250).json()["choices"][0]["text"] == cycle_text(5)
    for bad in ("0", "-1", "nan", "soon", "1e9"):
        answer = server.http.post(
            COMPLETIONS, json={"prompt": "Z"}, headers={**with_key(server, "five")["headers"], "x-request-timeout": bad}
        )
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-timeout")
