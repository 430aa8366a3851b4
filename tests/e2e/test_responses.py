"""The Responses API with OpenAI's own client, on the real server with the bundled model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import FunctionToolParam, Response
from pydantic import BaseModel

from tests.e2e.harness import PATIENCE, Server
from tests.e2e.test_openai_client import extras

MODEL = "shoal-moe"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 24}
LONG: dict[str, Any] = {"model": MODEL, "input": "Tell me a story.", "background": True, "max_output_tokens": 700}
WEATHER: FunctionToolParam = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Paris"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Weather(BaseModel):
    city: Literal["Rome", "Paris"]
    is_sunny: bool


@pytest.fixture(scope="module")
def client(main: Server) -> Iterator[openai.OpenAI]:
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(
        base_url=f"{main.url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE, http_client=http
    ) as made:
        yield made


def test_a_response_says_what_a_chat_says(client: openai.OpenAI) -> None:
    answer = client.responses.create(input="Say something.", instructions="Be brief.", **GREEDY)
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say something."}]
    chat = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=24)
    assert answer.output_text == chat.choices[0].message.content
    assert answer.usage is not None and chat.usage is not None
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.total_tokens == chat.usage.total_tokens
    Response.model_validate(answer.model_dump(), strict=True)
    assert extras(answer) == {"seed", "store"}
    counted = client.responses.input_tokens.count(model=MODEL, input="Say something.", instructions="Be brief.")
    assert counted.input_tokens == answer.usage.input_tokens


def test_a_stream_is_put_together(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"input": "Say something.", "include": ["message.output_text.logprobs"], **GREEDY}
    whole = client.responses.create(**asked)
    with client.responses.create(stream=True, **asked) as stream:
        events = list(stream)
    assert [one.sequence_number for one in events] == list(range(len(events)))
    assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == whole.output_text
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    part, streamed = (one.output[0].content[0] for one in (whole, last.response))  # type: ignore[union-attr, index]
    assert part == streamed and part.logprobs  # type: ignore[union-attr]


def test_an_object_is_parsed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": "The weather in Rome?", "text_format": Weather}
    answer = client.responses.parse(**asked, extra_body={"seed": 3})
    assert isinstance(answer.output_parsed, Weather)
    with client.responses.stream(**asked, extra_body={"seed": 3}) as stream:
        assert stream.get_final_response().output_parsed == answer.output_parsed


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]},
    ],
    ids=str,
)
def test_a_call_and_its_result_in_the_next_turn(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {"model": MODEL, "tools": [WEATHER], "max_output_tokens": 200}
    with client.responses.stream(input="The weather in Rome?", tool_choice=choice, **asked) as stream:
        first = stream.get_final_response()
    call = first.output[0]
    assert call.type == "function_call" and json.loads(call.arguments)["city"] in ("Rome", "Paris")
    assert call.parsed_arguments == json.loads(call.arguments)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"}
    history: list[Any] = [{"role": "user", "content": "The weather in Rome?"}, *first.output, result]
    texts = {
        client.responses.create(tool_choice="none", extra_body={"seed": 1}, **how, **asked).output_text
        for how in ({"input": history}, {"input": [result], "previous_response_id": first.id})
    }
    assert len(texts) == 1


def test_the_background_is_found_read_on_and_cancelled(client: openai.OpenAI) -> None:
    queued = client.responses.create(**LONG, extra_body={"ignore_eos": True})
    assert queued.status in ("queued", "in_progress")
    stream = client.responses.retrieve(queued.id, stream=True)
    some = [next(stream) for _ in range(20)]
    stream.close()
    now = client.responses.retrieve(queued.id)
    assert now.status == "in_progress" and len(now.output_text) > 0
    *_, last = client.responses.retrieve(queued.id, stream=True, starting_after=some[-1].sequence_number)
    assert last.type == "response.incomplete"
    whole = client.responses.retrieve(queued.id)
    assert whole == last.response and whole.status == "incomplete"
    deltas = [
        one.delta
        for one in client.responses.retrieve(queued.id, stream=True)
        if one.type == "response.output_text.delta"
    ]
    assert "".join(deltas) == whole.output_text
    listed = client.responses.input_items.list(queued.id)
    assert [item.type for item in listed.data] == ["message"]

    with client.responses.create(**LONG, stream=True, extra_body={"ignore_eos": True}) as begun:
        (created, *_) = [next(begun) for _ in range(10)]
    assert created.type == "response.created"
    assert client.responses.cancel(created.response.id).status == "cancelled"
    assert client.responses.retrieve(created.response.id).status == "cancelled"
    client.responses.delete(created.response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(created.response.id)


def test_a_background_that_nobody_reads_ends(client: openai.OpenAI) -> None:
    answer = client.responses.create(input="Say something.", background=True, **GREEDY)
    deadline = time.monotonic() + PATIENCE
    while answer.status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        answer = client.responses.retrieve(answer.id)
    assert answer.output_text


def test_faults_name_the_field(client: openai.OpenAI) -> None:
    for how, param in (
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"previous_response_id": "resp_0"}, "previous_response_id"),
        ({"max_output_tokens": 100_000}, "max_output_tokens"),
        ({"reasoning": {"effort": "vast"}}, "reasoning"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model=MODEL, input="hi", **how)  # type: ignore[call-overload]
        assert refused.value.param == param


def test_a_stream_that_fails_raises(client: openai.OpenAI) -> None:
    with (
        pytest.raises(openai.APIError, match=r"not finished|timeout|time"),
        client.responses.create(
            **LONG | {"background": False}, stream=True, extra_body={"timeout": 0.05, "ignore_eos": True}
        ) as stream,
    ):
        list(stream)
