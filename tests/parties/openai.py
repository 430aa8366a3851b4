"""OpenAI's Python client, of whichever major version: https://github.com/openai/openai-python."""

import base64
import json
import struct
from typing import Any, Literal

import openai
from openai import AsyncOpenAI, OpenAI
from party import MODEL, check, run
from pydantic import BaseModel

MESSAGES: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
FLAT_WEATHER: Any = {"type": "function", **WEATHER["function"]}
ASKED: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 200, "seed": 1}
CALLED: dict[str, Any] = ASKED | {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
client = OpenAI(max_retries=0)
print(openai.__version__)


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    is_sunny: bool


def expect(kind: type[openai.APIStatusError], what: str, function: Any, *args: Any, **options: Any) -> None:
    """Call this function, which has to raise an error of this kind that says what is wrong."""
    try:
        function(*args, **options)
    except kind as error:
        assert what in str(error), error
        assert error.request_id, error.response.headers
    else:
        raise AssertionError(f"no {kind.__name__}")


@check
def completions() -> None:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 24, "seed": 1, "logprobs": 2, "n": 2, "echo": True}
    whole = client.completions.create(prompt=["def add(a, b):", "import os"], **asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    pieces = [""] * 4
    with client.completions.create(prompt=["def add(a, b):", "import os"], stream=True, **asked) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                pieces[choice.index] += choice.text
    assert pieces == [choice.text for choice in whole.choices]
    assert whole.choices[0].text.startswith("def add(a, b):") and whole.choices[0].logprobs


@check
def a_chat_and_the_clients_own_accumulation_of_it() -> None:
    asked = ASKED | {"logprobs": True, "top_logprobs": 2, "stop": ["e", "\n"]}
    whole = client.chat.completions.create(**asked)
    assert whole.usage and whole.usage.total_tokens > whole.usage.completion_tokens > 0
    with client.chat.completions.stream(stream_options={"include_usage": True}, **asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "logprobs.content.delta"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].logprobs == whole.choices[0].logprobs
    assert final.usage and final.usage.total_tokens == whole.usage.total_tokens


@check
def calls_and_a_second_turn() -> None:
    whole = client.chat.completions.create(**CALLED)
    (call,) = whole.choices[0].message.tool_calls or []
    assert call.type == "function" and json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    with client.chat.completions.stream(**CALLED) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()
    (streamed,) = final.choices[0].message.tool_calls or []
    assert streamed.function.arguments == call.function.arguments == done[0].arguments
    assert streamed.function.parsed_arguments == json.loads(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"}
    turn = [*MESSAGES, whole.choices[0].message, result]
    second = client.chat.completions.create(**CALLED | {"messages": turn, "tool_choice": "none"})
    assert isinstance(second.choices[0].message.content, str)


@check
def an_object_is_parsed() -> None:
    parsed = client.chat.completions.parse(response_format=Weather, **ASKED).choices[0].message.parsed
    assert isinstance(parsed, Weather)
    with client.chat.completions.stream(response_format=Weather, **ASKED) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed
    tool = openai.pydantic_function_tool(Weather)
    called = client.chat.completions.parse(tools=[tool], tool_choice="required", **ASKED).choices[0].message
    assert called.tool_calls and isinstance(called.tool_calls[0].function.parsed_arguments, Weather)


@check
def responses() -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": "What is the weather in Paris?", "max_output_tokens": 200}
    seeded = asked | {"extra_body": {"seed": 1}}
    whole = client.responses.create(**seeded)
    with client.responses.stream(**seeded) as stream:
        events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == text == whole.output_text
    assert isinstance(client.responses.parse(text_format=Weather, **asked).output_parsed, Weather)
    first = client.responses.create(tools=[FLAT_WEATHER], tool_choice="required", **asked)
    call = next(item for item in first.output if item.type == "function_call")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"}
    again = asked | {"input": [result], "previous_response_id": first.id}
    assert client.responses.create(**again).previous_response_id == first.id
    assert client.responses.retrieve(first.id).output == first.output
    client.responses.delete(first.id)
    expect(openai.NotFoundError, first.id, client.responses.retrieve, first.id)


@check
def embeddings() -> None:
    """Of base64, which the client asks for and undoes, and of numbers."""
    texts = ["def add(a, b):", "import os"]
    packed = client.embeddings.create(model=MODEL, input=texts, dimensions=16)
    plain = client.embeddings.create(model=MODEL, input=texts, dimensions=16, encoding_format="float")
    assert [one.embedding for one in packed.data] == [one.embedding for one in plain.data]
    raw: Any = client.embeddings.create(model=MODEL, input="import os", dimensions=16, encoding_format="base64")
    assert list(struct.unpack("<16f", base64.b64decode(raw.data[0].embedding))) == plain.data[1].embedding


@check
def models() -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


@check
def errors_are_of_the_clients_classes() -> None:
    create = client.chat.completions.create
    expect(openai.NotFoundError, "model", create, **ASKED | {"model": "other"})
    expect(openai.BadRequestError, "temperature", create, **ASKED | {"temperature": 3})
    expect(openai.BadRequestError, "messages", create, model=MODEL, messages=[])
    expect(openai.BadRequestError, "n", create, stream=True, **ASKED | {"n": 0})
    expect(openai.BadRequestError, "max_tokens", client.completions.create, model=MODEL, prompt="a", max_tokens=10**6)
    expect(openai.NotFoundError, "unknown path", client.images.generate, prompt="a cat")


@check
def raw_answers_have_the_request_id() -> None:
    raw = client.chat.completions.with_raw_response.create(extra_headers={"x-request-id": "mine"}, **ASKED)
    assert raw.headers["x-request-id"] == raw.request_id == raw.parse()._request_id == "mine"
    assert client.chat.completions.create(**ASKED)._request_id
    with client.chat.completions.with_streaming_response.create(stream=True, **ASKED) as streamed:
        assert streamed.headers["x-request-id"] and any("[DONE]" in line for line in streamed.iter_lines())


@check
async def asynchronously() -> None:
    async with AsyncOpenAI() as other:
        whole = await other.chat.completions.create(**ASKED)
        pieces = [part async for part in await other.chat.completions.create(stream=True, **ASKED)]
        assert "".join(part.choices[0].delta.content or "" for part in pieces) == whole.choices[0].message.content
        async with other.chat.completions.stream(**CALLED) as stream:
            assert (await stream.get_final_completion()).choices[0].message.tool_calls


run()
