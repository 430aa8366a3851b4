"""LiteLLM's provider of Anthropic's API: https://docs.litellm.ai/docs/providers/anthropic."""

import json
import os
from typing import Any, Literal

import litellm
from party import API_KEY, MODEL, check, run
from pydantic import BaseModel

ASKED: dict[str, Any] = {
    "model": f"anthropic/{MODEL}",
    "api_base": os.environ["ANTHROPIC_BASE_URL"],
    "api_key": API_KEY,
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the weather in Paris?"},
    ],
    "max_tokens": 200,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    is_sunny: bool


@check
def a_text_and_its_usage() -> None:
    answer = litellm.completion(**ASKED, temperature=0.5, top_p=0.9, stop=["\n\n\n"])
    assert isinstance(answer.choices[0].message.content, str)
    assert answer.usage.prompt_tokens > 10 and answer.usage.completion_tokens > 0


@check
def a_text_in_pieces() -> None:
    chunks = list(litellm.completion(**ASKED, temperature=0, stream=True, stream_options={"include_usage": True}))
    built = litellm.stream_chunk_builder(chunks, messages=ASKED["messages"])
    whole = litellm.completion(**ASKED, temperature=0)
    assert built is not None and built.choices[0].message.content == whole.choices[0].message.content
    assert built.choices[0].finish_reason == whole.choices[0].finish_reason


@check
def a_call_and_a_second_turn() -> None:
    answer = litellm.completion(**ASKED, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    messages = [*ASKED["messages"], choice.message]
    for call in choice.message.tool_calls:
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
        messages.append({"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": "sunny"})
    second = litellm.completion(**ASKED | {"messages": messages}, tools=[WEATHER])
    assert second.choices[0].finish_reason in ("stop", "length", "tool_calls")


@check
def a_streamed_call_is_built_to_a_message() -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    chunks = list(litellm.completion(**ASKED, tools=[WEATHER], tool_choice=named, stream=True))
    built = litellm.stream_chunk_builder(chunks, messages=ASKED["messages"])
    assert built is not None
    assert all(json.loads(call.function.arguments)["city"] for call in built.choices[0].message.tool_calls)


@check
def a_pydantic_model_is_the_response_format() -> None:
    answer = litellm.completion(**ASKED, response_format=Weather)
    assert Weather.model_validate_json(answer.choices[0].message.content)


@check
async def messages_as_they_are() -> None:
    asked = {name: value for name, value in ASKED.items() if name != "messages"}
    answer = await litellm.anthropic.messages.acreate(**asked, messages=[{"role": "user", "content": "Hello"}])
    assert answer["type"] == "message" and answer["stop_reason"] in ("end_turn", "max_tokens")


@check
def an_error_has_its_type() -> None:
    try:
        litellm.completion(**ASKED | {"model": "anthropic/nobody"})
    except litellm.NotFoundError as error:
        assert "nobody" in str(error)
    else:
        raise AssertionError("no error")


run()
