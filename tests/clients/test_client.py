"""Requests and whole answers, against the official client where it has the same operation."""

from __future__ import annotations

import struct
from base64 import b64encode
from typing import Any

import openai
import pytest

from shoal.clients import Completion, Model, ProtocolError, StatusError, Tokenization, TokenLogprob, Usage
from tests.clients.conftest import Driver
from tests.clients.fake_server import USAGE, Answer, FakeServer, chat_completion, completion

HELLO: Any = [{"role": "user", "content": "hello"}]

EXTENSIONS: dict[str, Any] = {
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "ignore_eos": True,
    "min_tokens": 3,
    "stop_token_ids": [1, 2],
    "end_after": 5,
}


@pytest.fixture
def official(server: FakeServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)


def test_a_completion_request_is_the_official_clients(
    server: FakeServer, driver: Driver, official: openai.OpenAI
) -> None:
    options: dict[str, Any] = {
        "model": "shoal",
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "seed": 11,
        "stop": ["\n\n", "é"],
        "presence_penalty": 0.1,
        "frequency_penalty": -0.1,
        "echo": True,
        "logprobs": 3,
    }
    for _ in range(2):
        server.json(completion("a", "b"))
    with official:
        official.completions.create(prompt="Über", logit_bias={"5": 2}, extra_body=EXTENSIONS, **options)
    driver.call("complete", "Über", settings={"api_key": "secret"}, logit_bias={5: 2}, **options, **EXTENSIONS)

    theirs, ours = server.requests
    assert (ours.method, ours.path, ours.body) == (theirs.method, theirs.path, theirs.body)
    for header in ("authorization", "content-type"):
        assert ours.headers[header] == theirs.headers[header]


def test_a_chat_request_is_the_official_clients(server: FakeServer, driver: Driver, official: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "shoal", "max_tokens": 7, "logprobs": True, "top_logprobs": 2}
    for _ in range(2):
        server.json(chat_completion("hi"))
    with official:
        official.chat.completions.create(messages=HELLO, extra_body=EXTENSIONS, **options)
    driver.call("chat", HELLO, **options, **EXTENSIONS)

    theirs, ours = server.requests
    assert (ours.method, ours.path, ours.body) == (theirs.method, theirs.path, theirs.body)


def test_only_what_is_given_is_sent(server: FakeServer, driver: Driver) -> None:
    server.json(completion(""))
    driver.call("complete", [1, 2, 3])
    assert server.requests[0].body == {"prompt": [1, 2, 3]}
    assert "authorization" not in server.requests[0].headers


def test_a_completion_is_read_as_the_official_client_reads_it(
    server: FakeServer, driver: Driver, official: openai.OpenAI
) -> None:
    for _ in range(2):
        server.json(completion("größer", "🐟", seed=99))
    with official:
        theirs = official.completions.create(model="shoal", prompt="x")
    ours: Completion = driver.call("complete", "x")

    assert [(c.index, c.text, c.finish_reason) for c in ours.choices] == [
        (c.index, c.text, c.finish_reason) for c in theirs.choices
    ]
    assert ours.text == "größer"
    assert theirs.usage is not None
    assert theirs.usage.prompt_tokens_details is not None
    assert theirs.usage.completion_tokens_details is not None
    assert ours.usage == Usage(
        theirs.usage.prompt_tokens,
        theirs.usage.completion_tokens,
        theirs.usage.prompt_tokens_details.cached_tokens or 0,
        theirs.usage.completion_tokens_details.accepted_prediction_tokens or 0,
        theirs.usage.completion_tokens_details.rejected_prediction_tokens or 0,
    )
    assert (ours.id, ours.created, ours.model, ours.seed) == (theirs.id, theirs.created, theirs.model, 99)


def test_a_chat_answer_is_read_as_the_official_client_reads_it(
    server: FakeServer, driver: Driver, official: openai.OpenAI
) -> None:
    logprobs = {
        "content": [
            {
                "token": "hi",
                "logprob": -0.1,
                "bytes": [104, 105],
                "top_logprobs": [
                    {"token": "hi", "logprob": -0.1, "bytes": [104, 105]},
                    {"token": "ho", "logprob": -2.5, "bytes": [104, 111]},
                ],
            }
        ],
        "refusal": None,
    }
    for _ in range(2):
        server.json(chat_completion("hi", logprobs=logprobs))
    with official:
        theirs = official.chat.completions.create(model="shoal", messages=HELLO)
    ours: Completion = driver.call("chat", HELLO)

    assert ours.text == theirs.choices[0].message.content
    assert ours.choices[0].finish_reason == theirs.choices[0].finish_reason == "length"
    assert theirs.choices[0].logprobs is not None
    assert theirs.choices[0].logprobs.content is not None
    assert ours.choices[0].logprobs == tuple(
        TokenLogprob(entry.token, entry.logprob, tuple((top.token, top.logprob) for top in entry.top_logprobs))
        for entry in theirs.choices[0].logprobs.content
    )


def test_logprobs_of_an_echoed_prompt(server: FakeServer, driver: Driver) -> None:
    logprobs = {
        "tokens": ["Hel", "lo"],
        "token_logprobs": [None, -1.5],
        "top_logprobs": [None, {"lo": -1.5, "p": -0.5}],
        "text_offset": [0, 3],
    }
    choice = {"index": 0, "text": "Hello", "finish_reason": "length", "logprobs": logprobs}
    server.json(completion(choices=[choice]))
    answer: Completion = driver.call("complete", "Hello", echo=True, logprobs=1, max_tokens=0)
    assert answer.choices[0].logprobs == (
        TokenLogprob("Hel", None),
        TokenLogprob("lo", -1.5, (("p", -0.5), ("lo", -1.5))),
    )


def test_usage_without_details(server: FakeServer, driver: Driver) -> None:
    server.json(completion("x", usage={**USAGE, "prompt_tokens_details": None, "completion_tokens_details": None}))
    assert driver.call("complete", "x").usage == Usage(5, 2, 0)


def test_embeddings_are_the_official_clients(server: FakeServer, driver: Driver, official: openai.OpenAI) -> None:
    vectors = [[0.5, -0.25], [1.0, 0.0]]
    data = [{"index": i, "embedding": b64encode(struct.pack("<2f", *one)).decode()} for i, one in enumerate(vectors)]
    usage = {"prompt_tokens": 3, "total_tokens": 3}
    for entries in (data, data[::-1]):
        server.json({"object": "list", "data": entries, "model": "m", "usage": usage})
    with official:
        theirs = official.embeddings.create(model="m", input=["a", "b"], dimensions=2)
    ours = driver.call("embed", ["a", "b"], model="m", dimensions=2)
    assert [list(one) for one in ours.vectors] == [one.embedding for one in theirs.data] == vectors
    assert (ours.model, ours.usage.num_prompt_tokens, ours.usage.num_output_tokens) == ("m", 3, 0)
    assert server.requests[0].body == server.requests[1].body
    assert server.requests[0].path == server.requests[1].path

    server.json({"data": [{"index": 0, "embedding": vectors[0]}], "model": "m", "usage": usage})
    assert driver.call("embed", [5, 6]).vectors == (tuple(vectors[0]),)
    for broken in ("%%%%", "AAAA", None):
        server.json({"data": [{"index": 0, "embedding": broken}], "model": "m", "usage": usage})
        with pytest.raises(ProtocolError):
            driver.call("embed", "a")


def test_models(server: FakeServer, driver: Driver) -> None:
    served = {"id": "shoal", "object": "model", "created": 5, "owned_by": "shoal"}
    server.json({"object": "list", "data": [{**served, "max_model_len": 1024}, {**served, "id": "other"}]})
    assert driver.call("models") == (Model("shoal", 5, 1024), Model("other", 5))
    assert (server.requests[0].method, server.requests[0].path) == ("GET", "/v1/models")


def test_tokenize_and_detokenize(server: FakeServer, driver: Driver) -> None:
    for _ in range(2):
        server.json({"tokens": [4, 5], "count": 2, "max_model_len": 1024})
    server.json({"prompt": "hello"})
    assert driver.call("tokenize", "hello") == Tokenization((4, 5), 1024)
    assert driver.call("tokenize", HELLO) == Tokenization((4, 5), 1024)
    assert driver.call("detokenize", [4, 5]) == "hello"
    assert [(r.path, r.body) for r in server.requests] == [
        ("/tokenize", {"prompt": "hello"}),
        ("/tokenize", {"messages": HELLO}),
        ("/detokenize", {"tokens": [4, 5]}),
    ]


@pytest.mark.parametrize("body", [b"", b"OK", b'{"status": "ok"}'])
def test_health_is_in_the_status_alone(server: FakeServer, driver: Driver, body: bytes) -> None:
    server.answer(Answer(pieces=[body] if body else []))
    assert driver.call("health") is True


def test_health_of_a_server_that_is_not_ready_is_asked_once(server: FakeServer, driver: Driver) -> None:
    server.error(503, "the model is loading", Retry_After="0")
    assert driver.call("health") is False
    assert len(server.requests) == 1


def test_health_of_something_else(server: FakeServer, driver: Driver) -> None:
    server.error(404, "no such path")
    with pytest.raises(StatusError):
        driver.call("health")


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_a_base_url_may_have_a_path_and_end_in_v1_or_a_slash(server: FakeServer, driver: Driver, end: str) -> None:
    for path in ("", "/proxy"):
        server.json({"object": "list", "data": []})
        driver.url = f"{server.url}{path}{end}"
        driver.call("models")
    assert [r.path for r in server.requests] == ["/v1/models", "/proxy/v1/models"]
