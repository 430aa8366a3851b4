"""On the whole server the answer to a request depends on the request alone, byte for byte.

It does not depend on the requests beside it, its place in the queue, chunks, cached prefixes, preemptions or threads.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal.model.backends.native_library import supported_isas
from tests.e2e.harness import Server

pytestmark = pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")

COMPLETIONS = "/v1/completions"
# Too few blocks for what 64 requests at a time need.
FEW_BLOCKS = ("--num-blocks", "48")
INT8 = ("--quantization", "int8", "--kv-cache-dtype", "int8")

OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "stop": ["\n\n", "return"]},
    {"temperature": 0, "presence_penalty": 1.5, "logit_bias": {"40": 3.0, "300": -100}},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "stop": "self"},
    {"temperature": 1.2, "min_p": 0.02, "presence_penalty": -0.5, "ignore_eos": True},
    {"temperature": 0.7, "top_k": 30, "repetition_penalty": 0.9, "n": 2},
    {"temperature": 1.4, "top_n_sigma": 2.0, "typical_p": 0.9, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"temperature": 1.5, "top_p": 0.8, "top_k": 100, "frequency_penalty": -0.2, "logit_bias": {"13": -5.0}},
]


def make_requests(count: int) -> list[dict[str, Any]]:
    """Requests of all kinds; every fifth prompt has the same beginning, and each has its own end."""
    source = inspect.getsource(textwrap)
    beginnings = [source[start : start + 450] for start in range(0, 4500, 900)]
    return [
        {
            "prompt": beginnings[i % 5] + source[5000 + 7 * i : 5000 + 7 * i + 10 + 3 * (i % 30)],
            "max_tokens": 4 + i * 7 % 53,
            "seed": i,
            "logprobs": 2,
            **OPTIONS[i % len(OPTIONS)],
        }
        for i in range(count)
    ]


def choices_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The choices of an answer: texts, log-probabilities and finish reasons."""
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def send_alone(server: Server, requests: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [choices_of(server.post(COMPLETIONS, **request)) for request in requests]


def send_at_once(
    server: Server, requests: Sequence[dict[str, Any]], order: Sequence[int]
) -> list[list[dict[str, Any]]]:
    """Send the requests in the given order; return the answers in the order of `requests`."""

    async def send_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=None, trust_env=False, limits=limits) as client:
            return await asyncio.gather(*(client.post(COMPLETIONS, json=requests[i]) for i in order))

    answers = dict(zip(order, asyncio.run(send_all()), strict=True))
    return [choices_of(answers[i]) for i in range(len(requests))]


@pytest.fixture(params=[(), INT8], ids=["float32", "int8"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    """The bundled model twice: with room for all requests and one thread, and with few blocks and two threads."""
    servers: list[Server] = []
    for name, settings in (("wide", ()), ("narrow", ("--threads", "2", *FEW_BLOCKS))):
        (tmp_path / name).mkdir()
        servers.append(Server(tmp_path / name, *settings, *request.param))
    yield servers[0].wait_ready(), servers[1].wait_ready()
    for server in servers:
        server.close()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("num_requests", [30, pytest.param(200, marks=pytest.mark.long)])
def test_answers_are_those_of_each_request_alone(pair: tuple[Server, Server], num_requests: int) -> None:
    wide, narrow = pair
    requests = make_requests(num_requests)
    in_order = list(range(num_requests))
    shuffled = random.Random(1).sample(in_order, num_requests)
    alone = send_alone(wide, requests)
    for answers in (
        send_at_once(wide, requests, in_order),
        send_at_once(narrow, requests, in_order),
        send_at_once(narrow, requests, shuffled),
    ):
        different = [i for i in in_order if answers[i] != alone[i]]
        assert not different
    assert wide.metric("num_preemptions_total") == 0
    assert narrow.metric("num_preemptions_total") > 0
    assert narrow.metric("prefix_cache_hits_total") > 0
    texts = {choice["text"] for choices in alone for choice in choices}
    assert len(texts) > 3 * num_requests / 4, "the requests were meant to differ"
    assert {choice["finish_reason"] for choices in alone for choice in choices} == {"stop", "length"}
