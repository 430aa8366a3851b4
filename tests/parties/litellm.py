"""LiteLLM: https://docs.litellm.ai/docs/providers/openai_compatible."""

import json
from typing import Any, Literal

import litellm
from litellm import Message
from party import API_KEY, BASE_URL, MODEL, check, run
from pydantic import BaseModel

ASKED: dict[str, Any] = {
    "model": f"openai/{MODEL}",
    "api_base": BASE_URL,
    "api_key": API_KEY,
    "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    "max_tokens": 200,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Rome"]},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city"],
        },
    },
}


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    is_sunny: bool


@check
def a_pydantic_model_is_the_response_format() -> None:
    answer = litellm.completion(**ASKED, response_format=Weather)
    assert Weather.model_validate_json(answer.choices[0].message.content)


@check
def a_json_object() -> None:
    answer = litellm.completion(**ASKED | {"max_tokens": 900}, response_format={"type": "json_object"}, temperature=1)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


@check
def a_call_and_a_second_turn() -> None:
    answer = litellm.completion(**ASKED, tools=[WEATHER], tool_choice="required")
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    messages = [*ASKED["messages"], choice.message]
    for call in choice.message.tool_calls:
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
        messages.append({"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": "sunny"})
    second = litellm.completion(**ASKED | {"messages": messages}, tools=[WEATHER], tool_choice="none")
    assert isinstance(second.choices[0].message.content, str)


@check
def a_streamed_call_is_built_to_a_message() -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    chunks = list(litellm.completion(**ASKED, tools=[WEATHER], tool_choice=named, stream=True))
    built = litellm.stream_chunk_builder(chunks, messages=ASKED["messages"])
    assert built is not None and built.choices[0].finish_reason == "tool_calls"
    message: Message = built.choices[0].message
    assert all(json.loads(call.function.arguments)["city"] for call in message.tool_calls)


@check
async def asynchronously() -> None:
    answer = await litellm.acompletion(**ASKED, response_format=Weather)
    assert Weather.model_validate_json(answer.choices[0].message.content)


@check
async def vectors_of_texts() -> None:
    asked = {name: ASKED[name] for name in ("model", "api_base", "api_key")}
    answer = litellm.embedding(**asked, input=["def add(a, b):", "import os"], encoding_format="float")
    one, other = (entry["embedding"] for entry in answer.data)
    assert one != other and answer.usage.total_tokens > 0
    again = await litellm.aembedding(**asked, input="import os", dimensions=None)
    assert [entry["embedding"] for entry in again.data] == [other]


run()
