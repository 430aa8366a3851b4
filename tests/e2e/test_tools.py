"""Schemas and tools with OpenAI's own client and with ours, on the real server with the bundled model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel, Field

from shoal import ShoalClient
from shoal.clients import Message
from tests.e2e.harness import Server
from tests.schemas import random_schema


class Colour(Enum):
    RED, GREEN = "red", "green"


class Step(BaseModel):
    explanation: str = Field(max_length=30)
    colour: Colour


class Plan(BaseModel):
    steps: list[Step] = Field(min_length=1, max_length=3)
    is_done: bool
    number: int | None = Field(ge=0, le=99)


def tool(name: str, properties: dict[str, Any], **others: Any) -> ChatCompletionToolParam:
    schema = {"type": "object", "properties": properties, "required": sorted(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": schema, **others}}


CITY = {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}}
TOOLS = [
    tool("get_weather", CITY, strict=True, description="The weather of a city."),
    tool("add", {"a": {"type": "integer"}, "b": {"type": "integer", "minimum": 0, "maximum": 99}}),
]
ASKED: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the weather in Rome?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), "--method", "suffix", "--num-blocks", "512")
    yield server.wait_ready()
    server.close()


@pytest.fixture(scope="module")
def openai(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_parse_gives_an_object(openai: OpenAI) -> None:
    for seed in range(4):
        answer = openai.chat.completions.parse(
            model="shoal-moe", messages=ASKED, response_format=Plan, seed=seed, max_tokens=300
        )
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(answer.choices[0].message.parsed, Plan)


def test_a_stream_is_accumulated_to_the_same_object(openai: OpenAI) -> None:
    how: dict[str, Any] = {
        "model": "shoal-moe",
        "messages": ASKED,
        "response_format": Plan,
        "seed": 5,
        "max_tokens": 300,
    }
    with openai.chat.completions.stream(**how) as stream:
        streamed = stream.get_final_completion()
    whole = openai.chat.completions.parse(**how)
    assert streamed.choices[0].message.parsed == whole.choices[0].message.parsed is not None
    assert streamed.choices[0].message.content == whole.choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}], ids=str)
def test_a_demanded_call_has_arguments_of_its_schema(openai: OpenAI, choice: Any) -> None:
    for seed in range(4):
        how: dict[str, Any] = {"model": "shoal-moe", "messages": ASKED, "tools": TOOLS, "tool_choice": choice}
        how |= {"seed": seed, "max_tokens": 400, "parallel_tool_calls": False, "temperature": 0.7}
        answer = openai.chat.completions.create(**how).choices[0]
        assert answer.finish_reason == "tool_calls"
        (call,) = answer.message.tool_calls or []
        assert call.type == "function"
        assert choice == "required" or call.function.name == "add"
        schemas = {one["function"]["name"]: one["function"]["parameters"] for one in TOOLS}
        jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
        with openai.chat.completions.stream(**how) as stream:
            streamed = stream.get_final_completion().choices[0]
        assert streamed.message.tool_calls is not None
        one = streamed.message.tool_calls[0].function
        assert (one.name, one.arguments) == (call.function.name, call.function.arguments)


def test_a_second_turn_takes_the_answer_as_it_was(openai: OpenAI) -> None:
    first = openai.chat.completions.create(
        model="shoal-moe", messages=ASKED, tools=TOOLS, tool_choice="required", max_tokens=400, seed=1
    ).choices[0]
    messages: list[Any] = [*ASKED, first.message.model_dump()]
    messages += [
        {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "12 degrees"}]}
        for call in first.message.tool_calls or []
    ]
    second = openai.chat.completions.create(
        model="shoal-moe", messages=messages, tools=TOOLS, tool_choice="none", max_tokens=20, seed=1
    )
    assert second.choices[0].finish_reason in ("stop", "length")
    assert second.choices[0].message.tool_calls is None


def test_a_parsed_answer_is_sent_back_as_it_was(openai: OpenAI) -> None:
    how: dict[str, Any] = {"model": "shoal-moe", "max_tokens": 400, "tools": TOOLS[:1], "tool_choice": "required"}
    message = openai.chat.completions.parse(messages=ASKED, **how).choices[0].message
    (call,) = message.tool_calls or []
    dump: Any = message.model_dump()
    assert "parsed" in dump and dump["tool_calls"][0]["function"]["parsed_arguments"]
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"}
    for said in (dump, message):
        again = openai.chat.completions.parse(messages=[*ASKED, said, result], response_format=Plan, **how)
        assert again.choices[0].finish_reason == "tool_calls"


def test_tools_and_a_schema_together(openai: OpenAI) -> None:
    """What agents with typed results ask: the answer is a call, or of the schema."""
    for seed in range(6):
        answer = openai.chat.completions.parse(
            model="shoal-moe",
            messages=ASKED,
            tools=TOOLS[:1],
            parallel_tool_calls=False,
            response_format=Plan,
            seed=seed,
            max_tokens=400,
        ).choices[0]
        assert answer.finish_reason in ("stop", "tool_calls")
        assert bool(answer.message.tool_calls) != isinstance(answer.message.parsed, Plan)


# -- ShoalClient -------------------------------------------------------------------------------------------------------

QUESTION: list[Message] = [{"role": "user", "content": "What is the weather in Rome?"}]


def weather(city: Annotated[Literal["Rome", "Paris"], "where"], unit: Literal["C", "F"], is_exact: bool | None) -> str:
    """The weather of a city."""
    return f"{city}: 12 {unit}, {is_exact}"


@pytest.fixture
def shoal(server: Server) -> Iterator[ShoalClient]:
    with ShoalClient(server.url, max_retries=0) as client:
        yield client


def test_shoals_client_gives_an_object_streamed_and_whole(shoal: ShoalClient) -> None:
    whole = shoal.chat(QUESTION, response_format=Plan, seed=5, max_tokens=300)
    assert isinstance(whole.parsed, Plan)
    with shoal.stream_chat(QUESTION, response_format=Plan, seed=5, max_tokens=300) as stream:
        streamed = stream.whole()
    assert streamed.choices == whole.choices
    assert streamed.parsed == whole.parsed
    listed = shoal.complete("numbers = ", response_format={"type": "array", "items": {"type": "null"}}, seed=1)
    assert all(item is None for item in listed.parsed)


def test_shoals_client_has_functions_called(shoal: ShoalClient) -> None:
    how: dict[str, Any] = {"tools": [weather], "tool_choice": weather, "parallel_tool_calls": False, "max_tokens": 300}
    for seed in range(4):
        answer = shoal.chat(QUESTION, seed=seed, **how)
        with shoal.stream_chat(QUESTION, seed=seed, **how) as stream:
            (streamed,) = stream.whole().tool_calls
        (call,) = answer.tool_calls
        assert (streamed.name, streamed.arguments_json) == (call.name, call.arguments_json)
        result = call.result(weather(**call.arguments))
        after = shoal.chat([*QUESTION, answer.message, result], tools=[weather], tool_choice="none", max_tokens=5)
        assert not after.tool_calls


# -- schemas and their limits ------------------------------------------------------------------------------------------


def test_schemas_judged_by_jsonschema(server: Server) -> None:
    for seed in range(20):
        schema = {"name": "x", "schema": random_schema(seed)}
        answer = server.chat(
            "Fill this in.", response_format={"type": "json_schema", "json_schema": schema}, seed=seed, max_tokens=400
        )["choices"][0]
        if answer["finish_reason"] == "stop":
            jsonschema.Draft202012Validator(schema["schema"]).validate(json.loads(answer["message"]["content"]))


def test_a_tool_whose_schema_cannot_be_taken_is_named(server: Server) -> None:
    wrong = tool("f", {"a": {"type": "string", "pattern": "("}})
    refused = server.post("/v1/chat/completions", messages=ASKED, tools=[wrong], tool_choice="required")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "tools"
