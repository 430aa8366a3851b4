"""A law of every protocol: what OpenAI's and Anthropic's own clients put together of a stream is the whole answer.

The model has random weights, so that its texts break characters, and its calls and objects are whatever is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import openai
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.responses import Response
from pydantic import BaseModel

from tests.e2e.harness import PATIENCE, Server

MODEL = "tiny"
QUESTION = "the cat sat on"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "größer 楽しい"]}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "The weather.", "parameters": SCHEMA, "strict": True}
OTHER = {"name": "time", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
# What two answers to the same request need not have in common, or clients add: the second finds blocks of the first,
# and what a grammar forces is drafted where it comes in time.
DIFFERENT = {
    *("id", "call_id", "created", "created_at", "completed_at", "object"),
    *("prompt_tokens_details", "input_tokens_details", "cache_read_input_tokens"),
    *("accepted_prediction_tokens", "rejected_prediction_tokens"),
    *("parsed", "parsed_arguments", "parsed_output", "index"),
}
STOPS = st.lists(st.sampled_from(["e", "th", " c", "}", "ö", "し", "\n"]), max_size=2, unique=True)


def bodies(limit: str, **optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Fields of requests that give the same tokens each time.

    Args:
        limit: the name of the field with the number of tokens.
        optional: strategies of further fields.
    """
    temperatures: st.SearchStrategy[Any] = st.sampled_from([0, 0.7, 1])
    always = {limit: st.integers(1, 40), "temperature": temperatures, "seed": st.integers(0, 99)}
    extensions = st.fixed_dictionaries({"stream_interval": st.integers(1, 9)})
    return st.fixed_dictionaries(always, optional={**optional, "extra_body": extensions})


law: Callable[[Any], Any] = settings(max_examples=20, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def client(tiny: Server) -> Iterator[openai.OpenAI]:
    http = openai.DefaultHttpxClient(trust_env=False)
    options: dict[str, Any] = {"max_retries": 0, "timeout": PATIENCE, "http_client": http}
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="unused", **options) as made:
        yield made


@pytest.fixture(scope="module")
def claude(tiny: Server) -> Iterator[anthropic.Anthropic]:
    http = anthropic.DefaultHttpxClient(trust_env=False)
    options: dict[str, Any] = {"max_retries": 0, "timeout": PATIENCE, "http_client": http}
    with anthropic.Anthropic(base_url=tiny.url, api_key="unused", **options) as made:
        yield made


def shown(answer: BaseModel) -> Any:
    """An answer without what differs between two to the same request."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            if cached := value.get("cache_read_input_tokens"):  # Anthropic's input_tokens are without these
                value = value | {"input_tokens": value["input_tokens"] + cached}
            return {name: strip(one) for name, one in value.items() if one is not None and name not in DIFFERENT}
        return [strip(one) for one in value] if isinstance(value, list) else value

    return strip(answer.model_dump(warnings=False))  # it would warn of objects that the client has parsed


@law
@given(
    body=bodies(
        "max_tokens",
        prompt=st.just([QUESTION, "def add("]),
        n=st.integers(1, 3),
        logprobs=st.integers(0, 3),
        stop=STOPS,
        echo=st.booleans(),
    )
)
def test_completions(client: openai.OpenAI, body: dict[str, Any]) -> None:
    asked = {"model": MODEL, "prompt": QUESTION, **body}
    whole = client.completions.create(**asked)
    texts: dict[int, dict[str, Any]] = {one.index: {"text": "", "finish_reason": None} for one in whole.choices}
    logprobs: dict[int, dict[str, Any]] = {one.index: {} for one in whole.choices}
    usage = None
    for chunk in client.completions.create(stream=True, stream_options={"include_usage": True}, **asked):
        usage = chunk.usage or usage
        for piece in chunk.choices:
            texts[piece.index]["text"] += piece.text
            texts[piece.index]["finish_reason"] = piece.finish_reason
            for name, values in (piece.logprobs.model_dump() if piece.logprobs else {}).items():
                logprobs[piece.index].setdefault(name, []).extend(values)
    for one in whole.choices:
        assert texts[one.index] == one.model_dump(include={"text", "finish_reason"})
        assert logprobs[one.index] == (one.logprobs.model_dump() if one.logprobs else {})
    assert usage is not None and whole.usage is not None and shown(usage) == shown(whole.usage)


@law
@given(
    body=bodies(
        "max_tokens",
        n=st.integers(1, 2),
        stop=STOPS,
        top_logprobs=st.integers(0, 3),
        form=st.sampled_from(
            [
                {"response_format": {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}},
                {"tools": [FUNCTION], "tool_choice": "required"},
                {"tools": [FUNCTION, OTHER], "tool_choice": "required", "parallel_tool_calls": False},
                {"tools": [FUNCTION, OTHER], "tool_choice": "auto"},
            ]
        ),
    )
)
def test_chats(client: openai.OpenAI, body: dict[str, Any]) -> None:
    form = body.pop("form", {})
    asked: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], **body}
    asked |= {"logprobs": True} if "top_logprobs" in body else {}
    if form:
        asked["max_tokens"] += 60
    if "tools" in form:
        form = form | {"tools": [{"type": "function", "function": function} for function in form["tools"]]}
    whole = client.chat.completions.create(**form, **asked)
    state = ChatCompletionStreamState()
    usage = {"stream_options": {"include_usage": True}}
    for chunk in client.chat.completions.create(stream=True, **usage, **form, **asked):
        state.handle_chunk(chunk)
    assert shown(state.current_completion_snapshot) == shown(whole)


@law
@given(
    body=bodies(
        "max_tokens",
        stop_sequences=STOPS,
        form=st.sampled_from(
            [
                {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
                {"tool_choice": {"type": "any"}},
                {"tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}},
                {"tool_choice": {"type": "auto"}},
            ]
        ),
    )
)
def test_messages(claude: anthropic.Anthropic, body: dict[str, Any]) -> None:
    form = body.pop("form", {})
    tools = [{"name": one["name"], "input_schema": one["parameters"]} for one in (FUNCTION, OTHER)]
    form = form | ({"tools": tools} if "tool_choice" in form else {})
    extra = {name: body.pop(name) for name in ("temperature", "seed")} | body.pop("extra_body", {})
    asked: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], **body, **form}
    whole = claude.messages.create(extra_body=extra, **asked)
    with claude.messages.stream(extra_body=extra, **asked) as stream:
        texts = list(stream.text_stream)
        streamed = stream.get_final_message()
    assert shown(streamed) == shown(whole)
    assert "".join(texts) == "".join(block.text for block in whole.content if block.type == "text")


@law
@given(
    body=bodies(
        "max_output_tokens",
        top_logprobs=st.integers(0, 3),
        form=st.sampled_from(
            [
                {"text": {"format": {"type": "json_schema", "name": "weather", "strict": True, "schema": SCHEMA}}},
                {"tool_choice": "required"},
                {"tool_choice": "required", "parallel_tool_calls": False},
                {"tool_choice": "auto"},
            ]
        ),
    )
)
@example(body={"max_output_tokens": 25, "temperature": 0.7, "seed": 50, "top_logprobs": 0})  # ends without a text
def test_responses(client: openai.OpenAI, body: dict[str, Any]) -> None:
    body = dict(body)
    form = body.pop("form", {})
    form = form | (
        {"tools": [{"type": "function", **one} for one in (FUNCTION, OTHER)]} if "tool_choice" in form else {}
    )
    asked: dict[str, Any] = {
        "model": MODEL,
        "input": QUESTION,
        "extra_body": {"seed": body.pop("seed"), **body.pop("extra_body", {})},
        **body,
        **form,
    }
    asked |= {"include": ["message.output_text.logprobs"]} if "top_logprobs" in body else {}
    whole = client.responses.create(**asked)
    said: dict[tuple[int, str], str] = {}
    with client.responses.stream(**asked) as stream:
        for event in stream:
            if event.type in ("response.output_text.delta", "response.function_call_arguments.delta"):
                said[event.output_index, event.type.split(".")[1]] = event.snapshot  # of the client's accumulation
    assert event.type == f"response.{whole.status}"
    assert isinstance(event.response, Response) and shown(event.response) == shown(whole)
    for index, item in enumerate(whole.output):
        if item.type == "message":
            assert said.get((index, "output_text"), "") == item.content[0].text  # type: ignore[union-attr]
        elif item.type == "function_call":
            assert said.get((index, "function_call_arguments"), "") == item.arguments
            assert whole.status == "incomplete" or json.loads(item.arguments) is not None
