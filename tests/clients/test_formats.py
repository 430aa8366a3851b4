"""Answers that were asked to be of a class, or of a schema."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import openai
import pytest
from pydantic import BaseModel

from shoal.clients import Completion, ParseError, StructuredOutputs, UnsendableError
from tests.clients.conftest import Driver
from tests.clients.fake_server import FakeServer, chat_chunks, chat_completion, completion, completion_chunks

HELLO: Any = [{"role": "user", "content": "hello"}]
Item = TypeVar("Item")


class City(BaseModel):
    name: str
    inhabitants: int


class Box(BaseModel, Generic[Item]):
    item: Item


PARIS = City(name="Paris", inhabitants=2_100_000)
SCHEMA = City.model_json_schema()


def test_an_answer_of_a_class(server: FakeServer, driver: Driver) -> None:
    server.json(chat_completion(PARIS.model_dump_json(), finish_reason="stop"))
    answer: Completion[City] = driver.call("chat", HELLO, response_format=City)
    assert answer.parsed == PARIS and isinstance(answer.parsed, City)
    assert answer.parsed is answer.choices[0].parsed
    assert answer.text == PARIS.model_dump_json()
    assert server.requests[0].body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "City", "schema": SCHEMA},
    }


def test_a_name_has_only_what_the_api_allows(server: FakeServer, driver: Driver) -> None:
    server.json(chat_completion('{"item": 5}'))
    answer = driver.call("chat", HELLO, response_format=Box[int])
    assert answer.parsed == Box[int](item=5)
    assert server.requests[0].body["response_format"]["json_schema"]["name"] == "Box_int_"


@pytest.mark.parametrize("schema", [SCHEMA, {"anyOf": [{"type": "integer"}, SCHEMA]}, {"type": ["object", "null"]}, {}])
def test_an_answer_of_a_schema(server: FakeServer, driver: Driver, schema: dict[str, Any]) -> None:
    server.json(chat_completion(PARIS.model_dump_json()))
    answer = driver.call("chat", HELLO, response_format=schema)
    assert answer.parsed == PARIS.model_dump()
    assert server.requests[0].body["response_format"]["json_schema"]["schema"] == schema


@pytest.mark.parametrize(
    ("asked", "parsed"),
    [
        ({"type": "json_object"}, {"a": 1}),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "object"}}}, {"a": 1}),
        ({"type": "text"}, None),
        ({"type": "structural_tag", "structures": [], "triggers": []}, None),
    ],
)
def test_an_object_of_the_api_is_sent_as_the_official_client_sends_it(
    server: FakeServer, driver: Driver, asked: Any, parsed: Any
) -> None:
    for _ in range(2):
        server.json(chat_completion('{"a": 1}'))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as official:
        official.chat.completions.create(model="m", messages=HELLO, response_format=asked)
    answer = driver.call("chat", HELLO, model="m", response_format=asked)
    assert answer.parsed == parsed
    theirs, ours = server.requests
    assert ours.body == theirs.body


def test_a_text_that_nothing_was_asked_of(server: FakeServer, driver: Driver) -> None:
    server.json(chat_completion('{"a": 1}'))
    assert driver.call("chat", HELLO).parsed is None


@pytest.mark.parametrize("asked", [City, SCHEMA])
def test_a_text_that_is_cut_off_is_still_there(server: FakeServer, driver: Driver, asked: Any) -> None:
    server.json(chat_completion('{"name": "Par', finish_reason="length"))
    answer = driver.call("chat", HELLO, response_format=asked)
    assert (answer.text, answer.choices[0].finish_reason) == ('{"name": "Par', "length")
    with pytest.raises(ParseError, match=r"^the answer is not what response_format asks for: "):
        _ = answer.parsed


@pytest.mark.parametrize("asked", [int, PARIS, "json", 5, [SCHEMA]])
def test_what_cannot_be_asked_for_is_not_sent(server: FakeServer, driver: Driver, asked: Any) -> None:
    with pytest.raises(UnsendableError, match="response_format must be"):
        driver.call("chat", HELLO, response_format=asked)
    assert not server.requests


def test_completions_take_it_too(server: FakeServer, driver: Driver) -> None:
    server.json(completion(PARIS.model_dump_json(), '{"name": "Rome", "inhabitants": 0}'))
    server.stream(*completion_chunks(PARIS.model_dump_json()))
    answer = driver.call("complete", "A city: ", n=2, response_format=City)
    assert [choice.parsed.name for choice in answer.choices] == ["Paris", "Rome"]
    assert driver.whole("stream_complete", "A city: ", response_format=City).parsed == PARIS
    assert all(request.body["response_format"]["json_schema"]["name"] == "City" for request in server.requests)


def test_a_streamed_answer_of_a_class(server: FakeServer, driver: Driver) -> None:
    text = PARIS.model_dump_json()
    server.stream(*chat_chunks(text[:7], text[7:]))
    assert driver.whole("stream_chat", HELLO, response_format=City).parsed == PARIS
    assert server.requests[0].body["response_format"]["json_schema"]["schema"] == SCHEMA


def test_other_ways_to_ask_are_sent_as_they_are(server: FakeServer, driver: Driver) -> None:
    structured: StructuredOutputs = {"regex": "[a-z]+"}
    options = {"structured_outputs": structured, "grammar": 'start: "a"', "json_schema": SCHEMA}
    server.json(chat_completion("x"))
    driver.call("chat", HELLO, **options)
    assert server.requests[0].body == {"messages": HELLO, **options}
