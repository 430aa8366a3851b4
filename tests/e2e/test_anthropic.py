"""Anthropic's own client, unchanged, on the real server with the bundled model, an API key and injected faults."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import jsonschema
import pytest
from anthropic import Anthropic, AsyncAnthropic
from anthropic.types import Message, MessageParam, ToolParam
from pydantic import BaseModel

from tests.e2e.harness import PATIENCE, Server

KEY = "a-key"
ASKED: list[MessageParam] = [{"role": "user", "content": "What is the weather in Rome?"}]
HOW: dict[str, Any] = {"model": "shoal-moe", "messages": ASKED, "max_tokens": 400}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
}
WEATHER: ToolParam = {"name": "get_weather", "description": "The weather of a city.", "input_schema": SCHEMA}
DEMANDED: dict[str, Any] = {
    "tools": [WEATHER],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
}


class Plan(BaseModel):
    """Of words, for the client leaves limits of texts and lists out of the schema that it sends."""

    mood: Literal["good", "bad"]
    is_done: bool


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = (f"--api-keys={KEY}", "--fault-header", "--num-blocks", "512")
    server = Server(tmp_path_factory.mktemp("server"), *options)
    server.http.headers["x-api-key"] = KEY
    yield server.wait_ready()
    server.close()


def connect(server: Server, **options: Any) -> Anthropic:
    http = anthropic.DefaultHttpxClient(trust_env=False)
    defaults = {"api_key": KEY, "base_url": server.url, "max_retries": 0}
    return Anthropic(**{**defaults, "timeout": PATIENCE, "http_client": http, **options})


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Anthropic]:
    with connect(server) as client:
        yield client


def shown(message: Message) -> dict[str, Any]:
    """What two answers to the same request have in common."""
    dumped = message.model_dump(exclude={"id": True, "content": {"__all__": {"id"}}})
    usage = dumped["usage"]
    usage["input_tokens"] += usage.pop("cache_read_input_tokens")
    return dumped


@pytest.mark.parametrize("how", [{"max_tokens": 24}, DEMANDED, {"stop_sequences": ["a", "e"]}], ids=str)
def test_the_stream_is_the_whole_answer_in_pieces(client: Anthropic, how: dict[str, Any]) -> None:
    for seed in range(3):
        asked = HOW | how | {"extra_body": {"seed": seed, "temperature": 0.5}}  # newer clients have no field for these
        whole = client.messages.create(**asked)
        Message.model_validate(whole.model_dump(), strict=True)
        with client.messages.stream(**asked) as stream:
            texts = list(stream.text_stream)
            streamed = stream.get_final_message()
        assert shown(streamed) == shown(whole)
        assert "".join(texts) == "".join(block.text for block in whole.content if block.type == "text")


def test_the_text_is_that_of_the_chat(server: Server, client: Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, *ASKED]
    how: dict[str, Any] = {"model": "shoal-moe", "max_tokens": 24}
    message = client.messages.create(messages=messages, system="Be brief.", extra_body={"temperature": 0}, **how)
    said = [{"role": "system", "content": "Be brief."}, *messages]
    chat = server.post("/v1/chat/completions", messages=said, temperature=0, **how).json()
    (block,) = message.content
    assert block.type == "text" and block.text == chat["choices"][0]["message"]["content"]
    assert chat["usage"]["prompt_tokens"] == message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)


def test_what_the_assistant_has_begun_goes_on(client: Anthropic) -> None:
    how: dict[str, Any] = {"model": "shoal-moe", "extra_body": {"temperature": 0}}
    (first,) = client.messages.create(**how, messages=ASKED, max_tokens=4).content
    assert first.type == "text"
    begun: Any = [*ASKED, {"role": "assistant", "content": first.text}]
    (rest,) = client.messages.create(**how, messages=begun, max_tokens=4).content
    (whole,) = client.messages.create(**how, messages=ASKED, max_tokens=8).content
    assert rest.type == whole.type == "text" and first.text + rest.text == whole.text


def test_a_call_and_what_comes_after_it(client: Anthropic) -> None:
    for seed in range(3):
        first = client.messages.create(**HOW, **DEMANDED, extra_body={"seed": seed})
        assert first.stop_reason == "tool_use"
        (call,) = first.content
        assert call.type == "tool_use" and call.name == "get_weather"
        jsonschema.validate(call.input, SCHEMA)
        result: MessageParam = {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "12 degrees"}],
        }
        turns = [*ASKED, {"role": "assistant", "content": first.content}, result]
        second = client.messages.create(**HOW | {"messages": turns, "max_tokens": 20}, tools=[WEATHER])
        assert second.stop_reason in ("end_turn", "max_tokens")


def test_an_answer_of_a_schema(client: Anthropic) -> None:
    for seed in range(3):
        asked = HOW | {"extra_body": {"seed": seed}}
        whole = client.messages.parse(**asked, output_format=Plan)
        with client.messages.stream(**asked, output_format=Plan) as stream:
            streamed = stream.get_final_message()
        assert isinstance(whole.parsed_output, Plan) and streamed.parsed_output == whole.parsed_output


def test_tokens_are_counted(client: Anthropic) -> None:
    asked: dict[str, Any] = {"model": "shoal-moe", "messages": ASKED, "system": "Be brief.", "tools": [WEATHER]}
    usage = client.messages.create(**asked, max_tokens=1).usage
    counted = client.messages.count_tokens(**asked).input_tokens
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    again = client.messages.create(**asked, max_tokens=1).usage
    assert again.cache_read_input_tokens and again.input_tokens + again.cache_read_input_tokens == counted


def test_a_client_that_does_not_wait(server: Server) -> None:
    async def scene() -> list[Message]:
        http = anthropic.DefaultAsyncHttpxClient(trust_env=False)
        async with AsyncAnthropic(auth_token=KEY, base_url=server.url, http_client=http, max_retries=0) as client:
            asked = HOW | {"max_tokens": 8, "extra_body": {"temperature": 0}}
            whole = await client.messages.create(**asked)
            async with client.messages.stream(**asked) as stream:
                streamed = await stream.get_final_message()
            beta = await client.beta.messages.create(**asked, betas=["prompt-caching-2024-07-31"])
            assert beta.content[0].model_dump()["text"] == whole.content[0].model_dump()["text"]
        return [whole, streamed]

    whole, streamed = asyncio.run(scene())
    assert shown(whole) == shown(streamed)


def test_a_request_that_is_sent_again_is_done_once(server: Server) -> None:
    def ask() -> str:
        headers = {"idempotency-key": "once"}
        return server.http.post("/v1/messages", json=HOW | {"stream": True, "max_tokens": 8}, headers=headers).text

    assert ask() == ask()
    assert "[DONE]" not in ask()


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "error", "kind", "told"),
    [
        ({"extra_body": {"temperature": 2}}, anthropic.BadRequestError, "invalid_request_error", "temperature: "),
        ({"max_tokens": None}, anthropic.BadRequestError, "invalid_request_error", "max_tokens: "),
        ({"messages": "a " * 3000}, anthropic.BadRequestError, "invalid_request_error", "prompt has "),
        ({"model": "claude"}, anthropic.NotFoundError, "not_found_error", "the model 'claude' does not exist"),
        ({"system": "a" * 5_000_000}, anthropic.ContentTooLargeError, "request_too_large", "the request body has "),
    ],
)
def test_errors_have_types(client: Anthropic, asked: dict[str, Any], error: Any, kind: str, told: str) -> None:
    if isinstance(asked.get("messages"), str):
        asked = {"messages": [{"role": "user", "content": asked["messages"]}]}
    with pytest.raises(error) as caught:
        client.messages.create(**HOW | {"max_tokens": 4} | asked)
    body = caught.value.body
    assert caught.value.type == body["error"]["type"] == kind
    assert body["error"]["message"].startswith(told)
    assert body["type"] == "error" and body["request_id"] == caught.value.request_id


def test_errors_of_all_layers_have_this_shape(server: Server, client: Anthropic) -> None:
    with connect(server, api_key="wrong") as stranger, pytest.raises(anthropic.AuthenticationError) as caught:
        stranger.messages.create(**HOW)
    assert caught.value.type == "authentication_error"
    for answer, status, kind in (
        (server.get("/v1/messages"), 405, "invalid_request_error"),
        (server.get("/v1/messages/batches"), 404, "not_found_error"),
        (server.http.post("/v1/messages", content=b"{"), 400, "invalid_request_error"),
        (server.http.post("/v1/messages", json=HOW, headers={"origin": "http://evil"}), 403, "permission_error"),
        (server.http.post("/v1/messages", json=HOW, headers={"x-shoal-fault": "what"}), 400, "invalid_request_error"),
    ):
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
        assert answer.json()["type"] == "error"


@pytest.mark.parametrize(
    ("script", "error", "kind"),
    [
        ("429", anthropic.RateLimitError, "rate_limit_error"),
        ("500", anthropic.InternalServerError, "api_error"),
        ("503", anthropic.InternalServerError, "overloaded_error"),
        ("engine_error", anthropic.InternalServerError, "api_error"),
    ],
)
def test_faults_have_types(client: Anthropic, script: str, error: Any, kind: str) -> None:
    headers = {"x-shoal-fault": script, "x-shoal-fault-scope": f"{script} of messages"}
    with pytest.raises(error) as caught:
        client.messages.create(**HOW | {"max_tokens": 4}, extra_headers=headers)
    assert caught.value.type == kind


def test_an_error_in_a_stream_is_one(client: Anthropic) -> None:
    headers = {"x-shoal-fault": "error after=3", "x-shoal-fault-scope": "stream of messages"}
    with (
        pytest.raises(anthropic.APIStatusError) as caught,
        client.messages.stream(**HOW | {"max_tokens": 30}, extra_headers=headers) as stream,
    ):
        stream.until_done()
    assert caught.value.type == "api_error"


def test_a_deadline_is_told_of(server: Server) -> None:
    late = server.http.post("/v1/messages", json=HOW | {"max_tokens": 900, "timeout": 0.001})
    assert late.status_code in (408, 429)
    assert late.json()["error"]["type"] in ("timeout_error", "rate_limit_error")
    assert json.loads(late.text)["type"] == "error"
