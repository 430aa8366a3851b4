"""The bytes on the wire: keys, order of events, headers."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.e2e.conftest import API_KEYS
from tests.e2e.harness import Server, joined

USAGE = {"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details", "completion_tokens_details"}
COMPLETION_CHOICE = {"index", "text", "logprobs", "finish_reason"}
PARAMS: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "the cat"}], **PARAMS}


def test_a_completion(tiny: Server) -> None:
    response = tiny.post("/v1/completions", prompt="the cat", seed=-1, **PARAMS)
    answer = response.json()
    assert answer.keys() == {"id", "object", "created", "model", "choices", "system_fingerprint", "usage", "seed"}
    assert (answer["object"], answer["model"], answer["seed"]) == ("text_completion", "tiny", 2**64 - 1)
    assert re.fullmatch("cmpl-[0-9a-f]{24}", answer["id"])
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"] == answer["id"]
    assert response.headers["x-seed"] == str(2**64 - 1)
    (choice,) = answer["choices"]
    assert choice.keys() == COMPLETION_CHOICE
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    assert answer["usage"].keys() == USAGE
    assert answer["usage"]["completion_tokens"] == 6


def test_a_chat(tiny: Server) -> None:
    answer = tiny.post("/v1/chat/completions", **CHAT).json()
    assert answer.keys() == {"id", "object", "created", "model", "choices", "system_fingerprint", "usage", "seed"}
    assert answer["object"] == "chat.completion"
    assert re.fullmatch("chatcmpl-[0-9a-f]{24}", answer["id"])
    (choice,) = answer["choices"]
    assert choice.keys() == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"].keys() == {"role", "content", "refusal"}
    assert (choice["message"]["role"], choice["message"]["refusal"], choice["logprobs"]) == ("assistant", None, None)
    template = tiny.tokens("<user>the cat\n<assistant>")
    assert answer["usage"]["prompt_tokens"] == len(template)
    as_messages = tiny.post("/tokenize", messages=CHAT["messages"]).json()["tokens"]
    assert as_messages == template
    assert answer["choices"][0]["message"]["content"] == tiny.text(template, **PARAMS)


@pytest.mark.parametrize("include_usage", [False, True])
def test_the_events_of_a_completion(tiny: Server, include_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    chunks = tiny.stream("/v1/completions", prompt="the cat", n=2, **PARAMS, **options)
    always = {"id", "object", "created", "model", "choices", "system_fingerprint"} | (
        {"usage"} if include_usage else set()
    )
    assert chunks[0].keys() == always | {"seed"}
    assert all(chunk.keys() == always for chunk in chunks[1:])
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
    if include_usage:
        last = chunks.pop()
        assert last["choices"] == [] and last["usage"].keys() == USAGE
        assert last["usage"]["completion_tokens"] == 12
        assert all(chunk["usage"] is None for chunk in chunks)
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert all(choice.keys() == COMPLETION_CHOICE for choice in own)
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["length"]


@pytest.mark.parametrize("include_usage", [False, True])
def test_the_events_of_a_chat(tiny: Server, include_usage: bool) -> None:
    options = {"stream_options": {"include_usage": include_usage}}
    chunks = tiny.stream("/v1/chat/completions", **CHAT, **options, n=2)
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["seed"] for chunk in chunks if "seed" in chunk] == [chunks[0]["seed"]] * 2
    if include_usage:
        assert chunks[-1]["choices"] == [] and chunks.pop()["usage"]["completion_tokens"] == 12
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert all(choice.keys() == {"index", "delta", "logprobs", "finish_reason"} for choice in own)
        first, *middle, last = own
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert all(choice["delta"].keys() == {"content"} and choice["finish_reason"] is None for choice in middle)
        assert (last["delta"], last["finish_reason"]) == ({}, "length")


def test_nothing_is_generated_in_a_stream_of_no_tokens(tiny: Server) -> None:
    (chunk,) = tiny.stream("/v1/completions", prompt="the cat", max_tokens=0)
    assert (chunk["choices"][0]["text"], chunk["choices"][0]["finish_reason"]) == ("", "length")
    echoed = tiny.stream("/v1/completions", prompt="the cat", max_tokens=0, echo=True)
    assert joined(echoed) == "the cat"


def test_the_rest(tiny: Server) -> None:
    models = tiny.get("/v1/models").json()
    assert models.keys() == {"object", "data"} | {"first_id", "last_id", "has_more"}
    card = {"id", "object", "created", "owned_by", "root", "max_model_len", "capabilities"}
    assert models["data"][0].keys() == card | {"type", "display_name", "created_at"}
    assert tiny.get("/v1/models/tiny").json() == models["data"][0]
    assert re.fullmatch(r"\d+\.\d+\.\d+", tiny.get("/version").json()["version"])
    assert tiny.get("/health").content == b""
    assert "/v1/chat/completions" in tiny.get("/openapi.json").json()["paths"]


def test_how_the_server_is(tiny: Server) -> None:
    for method, path in (("GET", "/live"), ("GET", "/ready"), ("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        answer = tiny.http.request(method, path)
        assert (answer.status_code, answer.content) == (200, b"")
    with tiny.streaming("/v1/completions", prompt="the cat", max_tokens=3000, temperature=0, ignore_eos=True) as events:
        next(events)
        assert tiny.get("/load").json() == {"server_load": 1}
    tiny.until("the client has left", lambda: tiny.get("/load").json() == {"server_load": 0})


def test_head_and_options_on_all_paths(tiny: Server) -> None:
    paths = tiny.get("/openapi.json").json()["paths"]
    for path in paths:
        asked = re.sub("{.*}", "tiny", path)
        # A path may be another one's example, as /v1/responses/input_tokens is of /v1/responses/{response_id}.
        patterns = {other: re.sub("{.*?}", "[^/]+", other) for other in paths}
        expected = {
            method.upper() for other in paths if re.fullmatch(patterns[other], asked) for method in paths[other]
        }
        expected |= {"OPTIONS"} | ({"HEAD"} if "GET" in expected else set())
        options = tiny.http.options(asked)
        assert (options.status_code, set(options.headers["allow"].split(", "))) == (204, expected)
        head = tiny.http.head(asked)
        assert head.content == b""
        if "GET" in expected:
            with tiny.http.stream("GET", asked) as got:  # an answer may have no end
                assert head.status_code == got.status_code
                assert head.headers.get("content-type") == got.headers.get("content-type")
        else:
            assert (head.status_code, head.headers["allow"]) == (405, options.headers["allow"])
    assert tiny.http.options("/nowhere").status_code == 404


@pytest.mark.parametrize("text", ["the cat", " 数学 👍🏽\n\tnaïve\u0000", "<|bos|>the<|eos|>", "x" * 3000])
def test_tokens_go_there_and_back(tiny: Server, text: str) -> None:
    answer = tiny.post("/tokenize", prompt=text).json()
    assert answer.keys() == {"count", "max_model_len", "tokens"}
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 4096)
    assert tiny.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": text}


def test_api_keys(strict: Server) -> None:
    for header in ("", "Bearer", "Bearer wrong", f"Basic {API_KEYS[0]}", f"Bearer {API_KEYS[0]}x", "Bearer é"):
        for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("POST", "/tokenize")):
            response = strict.http.request(method, path, headers=[(b"authorization", header.encode())], json={})
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
            assert API_KEYS[0] not in error["message"]
    for key in API_KEYS:
        assert strict.get("/v1/models", headers=[(b"authorization", f"bearer {key}".encode())]).status_code == 200
    for path in ("/health", "/metrics", "/version"):
        assert strict.get(path, headers={"authorization": ""}).status_code == 200
