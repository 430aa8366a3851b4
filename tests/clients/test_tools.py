"""Tools: as they are offered, as the model calls them, and the turn after that."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Any, Literal

import jsonschema
import openai
import pytest
from pydantic import TypeAdapter, ValidationError

from shoal.clients import Completion, ParseError, ToolCall, UnsendableError
from shoal.clients.tools import wire_tool
from tests.clients.conftest import Driver
from tests.clients.fake_server import FakeServer, chat_completion

HELLO: Any = [{"role": "user", "content": "How is the weather in Zürich?"}]
DICT_TOOL: dict[str, Any] = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
MESSAGE: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}},
        {"id": "call_2", "type": "function", "function": {"name": "clock", "arguments": ""}},
    ],
}


def weather(
    city: Annotated[str, "where"],
    days: int = 1,
    unit: Literal["C", "F"] | None = None,
    *,
    notes: list[str] | None = None,
) -> str:
    """The weather of a city,
    as it will be.

    Not for the model.
    """
    return f"{city} {days} {unit} {notes}"


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city,\nas it will be.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "where"},
                "days": {"type": "integer"},
                "unit": {"anyOf": [{"enum": ["C", "F"]}, {"type": "null"}]},
                "notes": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


# -- tools that are offered --------------------------------------------------------------------------------------------


def test_a_function_is_described_by_its_signature_and_docstring() -> None:
    assert wire_tool(weather) == WEATHER
    jsonschema.Draft202012Validator.check_schema(wire_tool(weather)["function"]["parameters"])
    assert wire_tool(str_of)["function"] == {
        "name": "str_of",
        "parameters": {"type": "object", "properties": {}, "required": [], "additionalProperties": False},
        "strict": True,
    }


def str_of() -> None: ...


@pytest.mark.parametrize(
    "hint",
    [
        str, int, float, bool, list, dict, None, list[int], dict[str, list[bool]], int | None, Any,
        Literal["a", 2], list[Literal["a"] | float], Annotated[str, "text"], Annotated[int, 5],
    ],
)  # fmt: skip
def test_the_schema_of_a_type_takes_what_pydantic_takes(hint: Any) -> None:
    def tool(value: Any) -> None: ...

    tool.__annotations__["value"] = hint
    schema = wire_tool(tool)["function"]["parameters"]["properties"]["value"]
    values = [None, True, 0, 2, -7, 0.5, "", "a", [], [1], [True], ["a", 0.5], {}, {"a": []}, {"a": [True]}, {"a": 1}]
    for value in values:
        assert is_valid(value, schema) == is_of_type(value, hint), value


def is_valid(value: Any, schema: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


def is_of_type(value: Any, hint: Any) -> bool:
    try:
        TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return False
    return True


def untyped(city) -> None: ...  # type: ignore[no-untyped-def]
def many(*cities: str) -> None: ...
def options(**cities: str) -> None: ...
def by_position(city: str, /) -> None: ...
def of_bytes(city: bytes) -> None: ...
def of_sets(city: list[set[str]]) -> None: ...
def of_numbers(city: dict[int, str]) -> None: ...
def of_nothing(city: NoSuchType) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    "tool",
    [untyped, many, options, by_position, of_bytes, of_sets, of_numbers, of_nothing, partial(weather), 5, "weather"],
)
def test_what_is_no_tool_is_not_sent(server: FakeServer, driver: Driver, tool: Any) -> None:
    with pytest.raises(UnsendableError, match="tool"):
        driver.call("chat", HELLO, tools=[tool])
    assert not server.requests


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "clock"}}])
def test_tools_are_sent_as_the_official_client_sends_them(server: FakeServer, driver: Driver, choice: Any) -> None:
    options: dict[str, Any] = {"model": "m", "tool_choice": choice, "parallel_tool_calls": False}
    for _ in range(2):
        server.json(chat_completion("x"))
    with official(server) as client:
        client.chat.completions.create(messages=HELLO, tools=[WEATHER, DICT_TOOL], reasoning_effort="low", **options)  # type: ignore[call-overload]
    driver.call("chat", HELLO, tools=(weather, DICT_TOOL), reasoning_effort="low", **options)
    theirs, ours = server.requests
    assert ours.body == theirs.body


def test_a_function_may_be_the_choice(server: FakeServer, driver: Driver) -> None:
    server.json(chat_completion("x"))
    driver.call("chat", HELLO, tools=[weather], tool_choice=weather)
    assert server.requests[0].body["tool_choice"] == {"type": "function", "function": {"name": "weather"}}


# -- calls, and the next turn ------------------------------------------------------------------------------------------


def test_calls_are_read_as_the_official_client_reads_them(server: FakeServer, driver: Driver) -> None:
    for _ in range(2):
        server.json(chat_completion("", message=MESSAGE, finish_reason="tool_calls"))
    with official(server) as client:
        theirs = client.chat.completions.create(model="m", messages=HELLO).choices[0]
    ours: Completion[Any] = driver.call("chat", HELLO)
    assert ours.choices[0].finish_reason == theirs.finish_reason == "tool_calls"
    assert ours.tool_calls == tuple(
        ToolCall(call.id, call.function.name, call.function.arguments)
        for call in theirs.message.tool_calls or []
        if call.type == "function"
    )
    assert [call.arguments for call in ours.tool_calls] == [{"city": "Zürich"}, {}]
    assert ours.text == ""
    assert weather(**ours.tool_calls[0].arguments) == "Zürich 1 None None"


def test_the_next_turn_is_the_official_clients(server: FakeServer, driver: Driver) -> None:
    for _ in range(2):
        server.json(chat_completion("", message=MESSAGE, finish_reason="tool_calls"))
        server.json(chat_completion("It is warm."))
    with official(server) as client:
        message = client.chat.completions.create(model="m", messages=HELLO).choices[0].message
        results: Any = [
            {"role": "tool", "tool_call_id": "call_1", "content": "warm"},
            {"role": "tool", "tool_call_id": "call_2", "content": '{"hour": 5, "zone": "Zürich"}'},
        ]
        client.chat.completions.create(model="m", messages=[*HELLO, message, *results])
    answer = driver.call("chat", HELLO, model="m")
    first, second = answer.tool_calls
    turn = [answer.message, first.result("warm"), second.result({"hour": 5, "zone": "Zürich"})]
    driver.call("chat", [*HELLO, *turn], model="m")
    assert server.requests[3].body == server.requests[1].body


def test_messages_of_other_answers(server: FakeServer, driver: Driver) -> None:
    thought = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hmm."}
    server.json(chat_completion("", message=thought))
    server.json(chat_completion("", message={**MESSAGE, "content": "I look."}))
    answer = driver.call("chat", HELLO)
    assert (answer.text, answer.reasoning, answer.message) == ("Yes.", "Hmm.", thought)
    assert driver.call("chat", HELLO).message == {**MESSAGE, "content": "I look."}


def test_a_result_that_is_no_json() -> None:
    with pytest.raises(UnsendableError, match="result of weather"):
        ToolCall("1", "weather", "{}").result({weather})


@pytest.mark.parametrize("text", ['{"city": "Zür', "[]", "5", "null", "{} {}"])
def test_arguments_that_cannot_be_read_are_still_there(text: str) -> None:
    call = ToolCall("1", "weather", text)
    with pytest.raises(ParseError, match="the arguments of weather are"):
        _ = call.arguments
    assert call.arguments_json == text


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            {"content": "a", "tool_calls": None, "reasoning_content": None, "refusal": None, "audio": None},
            ("a", "", ()),
        ),
        ({"content": None, "reasoning": "of vLLM", "tool_calls": []}, ("", "of vLLM", ())),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
            ("", "", (ToolCall("", "f", '{"a": 1}'),)),
        ),
        ({"tool_calls": [{"id": "1", "function": {"name": "f"}, "more": 1}]}, ("", "", (ToolCall("1", "f", ""),))),
    ],
)
def test_answers_of_other_servers(server: FakeServer, driver: Driver, message: Any, expected: Any) -> None:
    server.json(chat_completion("", message=message))
    answer = driver.call("chat", HELLO)
    assert (answer.text, answer.reasoning, answer.tool_calls) == expected


def official(server: FakeServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
