"""`shoal bench` against a server that plays its answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shoal.loadtest.cli import bench
from tests.clients.fake_server import FakeServer, chat_chunks, chat_deltas, completion_chunks

MODELS = {"object": "list", "data": [{"id": "fish", "object": "model", "created": 1, "owned_by": "sea"}]}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fake = FakeServer()
    yield fake
    fake.close()


def probe(server: FakeServer, *num_prompt_tokens: int) -> None:
    """Play the answers to the requests that are not measured."""
    server.json(MODELS)
    for count in num_prompt_tokens:
        *chunks, last = chat_chunks("x")
        server.stream(*chunks, {**last, "usage": {"prompt_tokens": count, "completion_tokens": 1}})


def run(server: FakeServer, *args: str) -> Result:
    return CliRunner().invoke(bench, ["--url", server.url, "--concurrency", "1", *args])


def measured(server: FakeServer, *args: str, code: int = 0) -> dict[str, Any]:
    result = run(server, "--json", *args)
    assert (result.exit_code, result.stderr) == (code, "")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_what_is_sent_is_what_every_server_takes(server: FakeServer) -> None:
    probe(server, 18, 418)  # 2 tokens for a word, and 2 around them
    for _ in range(3):
        server.stream(*chat_chunks("a", "b"))
    found = measured(server, "--requests", "3", "--prompt-tokens", "102", "--max-tokens", "5")
    assert found["model"] == "fish"
    bodies = [request.body for request in server.requests[3:]]
    prompts = {body["messages"][0].pop("content") for body in bodies}
    assert len(prompts) == 3 and {len(prompt.split()) for prompt in prompts} == {50}
    expected = {
        "model": "fish",
        "messages": [{"role": "user"}],
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert bodies == [expected] * 3
    assert all("x-stream-resume" not in request.headers for request in server.requests)


def test_the_figures(server: FakeServer) -> None:
    probe(server, 8, 208)
    for _ in range(4):
        server.stream(*chat_chunks("a", "b", "c"))
    found = measured(server, "--requests", "4")
    figures = found["figures"]
    assert (figures["requests"], figures["errors"], found["counted_by"]) == (4, 0, "usage")
    assert (figures["prompt tokens"], figures["output tokens"]) == (20, 8)
    for latency in ("ttft", "itl", "tpot", "e2e"):
        assert 0 <= figures[f"{latency} p50"] <= figures[f"{latency} p90"] <= figures[f"{latency} p99"]
    assert 0 < figures["ttft p50"] <= figures["e2e p50"] <= figures["seconds"]
    assert figures["throughput"] == pytest.approx(8 / figures["seconds"])


def test_failures_are_counted_by_kind(server: FakeServer) -> None:
    probe(server, 8, 208)
    server.stream(*chat_chunks("a", "b"))
    server.error(429, "later", code="queue_full")
    server.error(429, "later", code="queue_full")
    server.stream(*chat_chunks("a")[:2], done=False, ending="cut")
    found = measured(server, "--requests", "4", code=1)
    assert found["errors"] == {"HTTP 429 queue_full": 2, "BrokenConnection": 1}
    assert found["examples"]["HTTP 429 queue_full"] == "later"
    assert (found["figures"]["requests"], found["figures"]["errors"]) == (1, 3)


def test_a_server_that_does_not_count_has_its_chunks_counted(server: FakeServer) -> None:
    server.json(MODELS)
    for _ in range(3):
        server.stream(*chat_chunks("a", "b", "c")[:-1])
    result = run(server, "--requests", "1")
    assert result.exit_code == 0
    assert "output tokens are chunks of the streams" in result.stderr
    assert result.stdout.splitlines()[3].split()[-1] == "3"


@pytest.mark.parametrize("deltas", [[{"reasoning_content": "Hmm"}, {"reasoning_content": "."}], []])
def test_thoughts_are_tokens_and_an_answer_may_be_empty(server: FakeServer, deltas: list[dict[str, str]]) -> None:
    probe(server, 8, 208)
    server.stream(*chat_deltas(*deltas))
    figures = measured(server, "--requests", "1")["figures"]
    assert (figures["requests"], len([name for name in figures if name.startswith("ttft")])) == (1, 4)


def test_tables_for_people(server: FakeServer) -> None:
    probe(server, 8, 208)
    server.stream(*chat_chunks("a", "b"))
    server.error(500, "out of fish")
    result = run(server, "--requests", "2")
    assert result.exit_code == 1
    assert result.stderr == "! 1 failed, HTTP 500: out of fish\n"
    assert f"fish at {server.url}; tokens are means of a request" in result.stdout
    rows = [line.split()[0] for line in result.stdout.splitlines() if line]
    assert rows[-4:] == ["TTFT", "ITL", "TPOT", "end-to-end"]


def test_an_open_loop_of_completions(server: FakeServer) -> None:
    for _ in range(4):
        server.stream(*completion_chunks("a", "b"))
    found = measured(server, "--model", "m", "--endpoint", "completions", "--rate", "1000", "--requests", "2")
    assert {request.path for request in server.requests} == {"/v1/completions"}
    assert {request.body["model"] for request in server.requests} == {"m"}
    assert (found["rate"], found["figures"]["requests"]) == (1000.0, 2)


def test_a_server_that_refuses_the_first_request_is_not_measured(server: FakeServer) -> None:
    server.json(MODELS)
    server.error(401, "wrong key")
    result = run(server)
    assert (result.exit_code, result.stderr) == (2, "shoal bench: wrong key\n")


def test_a_server_without_models(server: FakeServer) -> None:
    server.json({"object": "list", "data": []})
    result = run(server)
    assert (result.exit_code, result.stderr) == (2, "shoal bench: the server names no model; give one by --model\n")
