"""Bad input: the message names the field and the limit, and other requests go on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.e2e.harness import Server
from tests.examples import examples

COMPLETION: dict[str, Any] = {"prompt": "the cat", "max_tokens": 2, "seed": 1, "ignore_eos": True}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
NAN, INFINITY = float("nan"), float("inf")

# field, value, what the message says of the limit
FOR_BOTH: list[tuple[str, Any, str]] = [
    ("temperature", -0.1, ">= 0"),
    ("temperature", 2.1, "<= 2"),
    ("temperature", NAN, "JSON"),
    ("temperature", INFINITY, "JSON"),
    ("temperature", "hot", "number"),
    ("temperature", True, "number"),
    ("top_p", 0, "> 0"),
    ("top_p", 1.5, "<= 1"),
    ("min_p", -1, ">= 0"),
    ("typical_p", 1.5, "<= 1"),
    ("top_n_sigma", 2000, "<= 1000"),
    ("xtc_probability", -0.5, ">= 0"),
    ("xtc_threshold", "low", "number"),
    ("top_k", -2, ">= -1"),
    ("top_k", 1.5, "integer"),
    ("top_k", 2**31, "<= 2147483647"),
    ("top_k", 10**30, "<= 2147483647"),
    ("presence_penalty", -2.5, ">= -2"),
    ("frequency_penalty", NAN, "JSON"),
    ("repetition_penalty", 1e-100, ">= 0.01"),
    ("n", 0, ">= 1"),
    ("n", 129, "<= 128"),
    ("n", "2", "integer"),
    ("max_tokens", -2, ">= -1"),
    ("max_tokens", INFINITY, "JSON"),
    ("max_tokens", 5000, "max_tokens can be at most"),
    ("max_tokens", 10**30, "<= 2147483647"),
    ("min_tokens", 3, "max_tokens is 2"),
    ("min_tokens", -3, ">= 0"),
    ("seed", 2**64, "<= 18446744073709551615"),
    ("seed", 0.5, "integer"),
    ("stop", ["a", ""], "length >= 1"),
    ("stop", ["a"] * 17, "length <= 16"),
    ("stop", "x" * 257, "length <= 256"),
    ("stop", [1], "text"),
    ("stop_token_ids", [320], "vocabulary of 320"),
    ("stop_token_ids", [-1], ">= 0"),
    ("logit_bias", {"320": 1}, "vocabulary of 320"),
    ("logit_bias", {"x": 1}, "not a token id"),
    ("logit_bias", {"-1": 1}, "not a token id"),
    ("logit_bias", {"٣": 1}, "not a token id"),
    ("logit_bias", {"9" * 5000: 1}, "not a token id"),
    ("logit_bias", {"5": 101}, "<= 100"),
    ("logit_bias", {"5": None}, "number"),
    ("logit_bias", [5], "object"),
    ("stream", "yes", "true or false"),
    ("stream_options", {"include_usage": 1}, "true or false"),
    ("stream_options", {"include_usage": True}, "only allowed when stream is true"),
    ("stream_options", {"other": True}, "unrecognized request argument: stream_options.other"),
    ("priority", 1001, "<= 1000"),
    ("priority", "high", "integer"),
    ("ttft_slo_ms", 0, "> 0"),
    ("timeout", 0, "> 0"),
    ("timeout", 86_401, "<= 86400"),
    ("timeout", "soon", "number"),
    ("end_after", 0, ">= 1"),
    ("end_after", 1.5, "integer"),
    ("end_after", 3, "max_tokens is 2"),
    ("tpot_slo_ms", INFINITY, "JSON"),
    ("user", 5, "text"),
    ("model", 5, "text"),
    ("temprature", 1, "unrecognized request argument: temprature"),
]
FOR_COMPLETIONS: list[tuple[str, Any, str]] = [
    ("prompt", "", "empty"),
    ("prompt", [], "empty"),
    ("prompt", [[]], "empty"),
    ("prompt", ["a", ""], "empty"),
    ("prompt", None, "text"),
    ("prompt", 5, "text"),
    ("prompt", [1, "a"], "only token ids"),
    ("prompt", [None] * 100_000, "expected an integer or text or a list"),
    ("prompt", [320], "vocabulary of 320"),
    ("prompt", [[5], [320]], "vocabulary of 320"),
    ("prompt", [-1], ">= 0"),
    ("prompt", [5] * 4097, "context holds 4096"),
    ("prompt", "a b " * 5000, "context holds 4096"),
    ("prompt", ["a"] * 2000, "at most 1088"),
    ("logprobs", 21, "<= 20"),
    ("logprobs", True, "integer"),
    ("best_of", 2, "1"),
    ("suffix", "x", "fill in the middle"),
    ("echo", 1, "true or false"),
    ("messages", [], "unrecognized"),
]
FOR_CHAT: list[tuple[str, Any, str]] = [
    ("messages", [], "length >= 1"),
    ("messages", "hi", "a list"),
    ("messages", [{"role": "user", "content": "x " * 5000}], "context holds 4096"),
    ("messages", [{"role": "robot", "content": "hi"}], "'user'"),
    ("messages", [{"content": "hi"}], "role"),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "'text'"),
    ("messages", [{"role": "user", "content": 5}], "text"),
    ("messages", [None] * 100_000, "object"),
    ("max_completion_tokens", -2, ">= -1"),
    ("top_logprobs", 3, "logprobs"),
    ("top_logprobs", 21, "<= 20"),
    ("tools", [{"type": "function", "function": {"name": "f g"}}], "regex"),
    ("tools", [{"type": "custom", "function": {"name": "f"}}], "'function'"),
    ("tools", [{"type": "function", "function": {"name": "f"}}] * 2, "before another tool"),
    ("tools", [{"type": "function", "function": {"name": "f"}}] * 129, "length <= 128"),
    ("tool_choice", "required", "needs tools"),
    ("tool_choice", "any", "'auto' or 'none' or 'required'"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}, "no tool 'f'"),
    ("chat_template_kwargs", {"messages": []}, "no variable"),
    ("reasoning_effort", "some", "'minimal'"),
    ("response_format", {"type": "yaml"}, "'text'"),
    ("response_format", {"type": "json_schema", "json_schema": {}}, "schema: is needed"),
    ("modalities", ["audio"], "'text'"),
]


@pytest.fixture(scope="module", autouse=True)
def others_go_on(tiny: Server) -> Iterator[None]:
    """A stream that runs while the server gets the bad requests; its text does not change."""
    params: dict[str, Any] = {"prompt": "the dog", "temperature": 0, "ignore_eos": True, "max_tokens": 1500}
    expected = tiny.text(**params)
    with tiny.streaming("/v1/completions", **params) as stream:
        texts = [next(stream)["choices"][0]["text"]]
        yield
        texts += [chunk["choices"][0]["text"] for chunk in stream]
    assert "".join(texts) == expected


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(error["message"]) < 500
    return error


def named(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:24]


@pytest.mark.parametrize(
    ("path", "field", "value", "limit"),
    [
        pytest.param(path, *case, id=f"{path.rpartition('/')[0][4:]}-{case[0]}-{named(case[1])}")
        for path, cases in (
            ("/v1/completions", FOR_BOTH + FOR_COMPLETIONS),
            ("/v1/chat/completions", FOR_BOTH + FOR_CHAT),
        )
        for case in cases
    ],
)
def test_a_parameter_is_refused_by_name(tiny: Server, path: str, field: str, value: Any, limit: str) -> None:
    body = (CHAT if "chat" in path else COMPLETION) | {field: value}
    error = refused(tiny.http.post(path, content=json.dumps(body)))
    assert error["type"] == "invalid_request_error"
    if limit == "JSON":  # no JSON has such a number
        assert error["param"] is None and "not valid JSON" in error["message"]
        return
    assert error["param"] == ("prompt" if field == "messages" and "context" in limit else field)
    assert limit in error["message"]
    assert field in error["message"] or "prompt" in error["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b'"x"', b'{"prompt": "\xff"}', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000],
    ids=range(9),
)
def test_a_body_that_is_no_json_object(tiny: Server, path: str, raw: bytes) -> None:
    error = refused(tiny.http.post(path, content=raw))
    assert error["type"] == "invalid_request_error"
    # A field that does not belong there may come before the fault.
    faults = (
        *("not valid JSON", "request body: expected an object", "unrecognized request argument: prompt"),
        "the request body has more than 50000 times '['",
    )
    assert any(fault in error["message"] for fault in faults)


def test_a_missing_field(tiny: Server) -> None:
    for path, field in (("/v1/completions", "prompt"), ("/v1/chat/completions", "messages"), ("/detokenize", "tokens")):
        assert refused(tiny.post(path))["param"] == field
    assert refused(tiny.post("/tokenize"))["param"] == "prompt"
    assert refused(tiny.post("/detokenize", tokens=[320]))["param"] == "tokens"


def test_what_does_not_exist(tiny: Server) -> None:
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT), ("/tokenize", {"prompt": "a"})):
        error = refused(tiny.post(path, **body, model="gpt-5"), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "'gpt-5'" in error["message"] and "'tiny'" in error["message"]
    refused(tiny.get("/v1/models/gpt-5"), 404)
    assert "/v1/moderations" in refused(tiny.post("/v1/moderations"), 404)["message"]
    for method, path in (
        ("GET", "/v1/completions"),
        ("DELETE", "/v1/models"),
        ("POST", "/health"),
        ("PUT", "/metrics"),
    ):
        assert refused(tiny.http.request(method, path), 405)["code"] == "method_not_allowed"


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_of_ten_megabytes(tiny: Server, announced: bool) -> None:
    raw = json.dumps({"prompt": "a" * 10_000_000}).encode()
    chunks = (raw[at : at + 65536] for at in range(0, len(raw), 65536))
    error = refused(tiny.http.post("/v1/completions", content=raw if announced else chunks), 413)
    assert "4194304" in error["message"]


def test_clients_that_break_off(tiny: Server) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n"
    for raw in (b"", b"GET", b"\x00\xff\r\n\r\n", head, head + b'{"prompt": '):
        with socket.create_connection(("127.0.0.1", tiny.port)) as connection:
            connection.sendall(raw)
    assert tiny.complete(**COMPLETION)["usage"]["completion_tokens"] == 2
    assert "Traceback" not in tiny.log


# -- anything at all ---------------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner))
small = st.integers(-2, 6)
plausible: dict[str, st.SearchStrategy[Any]] = {
    "n": small,
    "temperature": st.floats(-0.5, 3) | small,
    "top_p": st.floats(-0.1, 1.1),
    "top_k": st.integers(-2, 400),
    "min_p": st.floats(0, 1),
    "typical_p": st.floats(-0.1, 1.1),
    "top_n_sigma": st.floats(-2, 5),
    "xtc_probability": st.floats(0, 1),
    "xtc_threshold": st.floats(0, 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0, 11),
    "logit_bias": st.dictionaries(st.integers(-1, 330).map(str) | st.text(max_size=3), st.floats(-101, 101)),
    "seed": st.integers(-(2**64), 2**65),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=18),
    "stop_token_ids": st.lists(st.integers(-1, 330), max_size=4),
    "min_tokens": small,
    "ignore_eos": st.booleans(),
    "end_after": small,
    "stream": st.booleans(),
    "stream_options": st.none() | st.just({"include_usage": True}),
    "user": st.text(max_size=8),
}
prompts = st.text(max_size=12) | st.lists(st.integers(-1, 330), max_size=6)
completions = st.fixed_dictionaries(
    {"prompt": prompts | st.lists(prompts, max_size=3), "max_tokens": small},
    optional=plausible | {"echo": st.booleans(), "logprobs": st.integers(-1, 21)},
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "x"]), "content": st.text()}),
    max_size=3,
)
chats = st.fixed_dictionaries(
    {"messages": messages, "max_tokens": small},
    optional=plausible | {"logprobs": st.booleans(), "top_logprobs": st.integers(-1, 21)},
)
requests = st.tuples(st.just("/v1/completions"), completions) | st.tuples(st.just("/v1/chat/completions"), chats)


@settings(max_examples=examples(250), suppress_health_check=list(HealthCheck))
@given(request=requests, spoilt=st.none() | st.tuples(st.sampled_from([*plausible, "prompt", "messages"]), anything))
def test_every_request_is_answered_or_refused(
    tiny: Server, request: tuple[str, dict[str, Any]], spoilt: tuple[str, Any] | None
) -> None:
    path, body = request
    body = body | {"max_tokens": min(body["max_tokens"], 6)} | ({spoilt[0]: spoilt[1]} if spoilt else {})
    response = tiny.http.post(path, content=json.dumps(body))
    if response.status_code == 200:
        assert "error" not in response.text[:10]
        assert (body.get("stream") is True) == response.text.endswith("data: [DONE]\n\n")
        assert 'data: {"error"' not in response.text
    else:
        assert refused(response)["type"] == "invalid_request_error"


@settings(max_examples=examples(80), suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]), raw=st.binary())
def test_bytes_are_refused(tiny: Server, path: str, raw: bytes) -> None:
    refused(tiny.http.post(path, content=raw))


@settings(max_examples=examples(80), suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]), value=anything)
def test_json_of_any_shape_is_refused(tiny: Server, path: str, value: Any) -> None:
    refused(tiny.http.post(path, content=json.dumps(value)))
