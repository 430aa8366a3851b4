"""AutoGen's OpenAI client and assistants: https://microsoft.github.io/autogen/stable/user-guide/agentchat-user-guide."""

import json
from typing import Any, Literal

from autogen_agentchat.agents import AssistantAgent
from autogen_core import CancellationToken, FunctionCall
from autogen_core.models import (
    AssistantMessage,
    CreateResult,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    ModelInfo,
    UserMessage,
)
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from party import API_KEY, BASE_URL, MODEL, check, run
from pydantic import BaseModel

QUESTION = UserMessage(content="What is the weather in Paris?", source="user")


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    is_sunny: bool


async def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"It is sunny in {city}."


TOOL = FunctionTool(get_weather, description="The weather of a city.", strict=True)


def client(**options: Any) -> OpenAIChatCompletionClient:
    info = ModelInfo(vision=False, function_calling=True, json_output=True, family="unknown", structured_output=True)
    return OpenAIChatCompletionClient(
        model=MODEL, base_url=BASE_URL, api_key=API_KEY, model_info=info, max_tokens=200, **options
    )


@check
async def a_structured_answer() -> None:
    answer = await client().create([QUESTION], json_output=Weather)
    assert Weather.model_validate_json(str(answer.content))


@check
async def calls_and_a_second_turn() -> None:
    asked = client()
    answer = await asked.create([QUESTION], tools=[TOOL], tool_choice="required")
    assert answer.finish_reason == "function_calls"
    results = []
    for call in answer.content:
        assert isinstance(call, FunctionCall)
        result = await TOOL.run_json(json.loads(call.arguments), CancellationToken())
        results.append(FunctionExecutionResult(content=result, call_id=call.id, is_error=False, name=call.name))
    turn = [AssistantMessage(content=answer.content, source="model"), FunctionExecutionResultMessage(content=results)]
    second = await asked.create([QUESTION, *turn], tools=[TOOL], tool_choice="none")
    assert isinstance(second.content, str)


@check
async def streamed_calls() -> None:
    *_, last = [part async for part in client().create_stream([QUESTION], tools=[TOOL], tool_choice=TOOL)]
    assert isinstance(last, CreateResult)
    assert [call.name for call in last.content] == ["get_weather"]


@check
async def an_assistant_with_tools() -> None:
    agent = AssistantAgent("weather", client(), tools=[get_weather], reflect_on_tool_use=True, max_tool_iterations=2)
    answer = await agent.run(task="What is the weather in Paris?")
    assert answer.messages


@check
async def an_assistant_whose_answer_is_structured() -> None:
    agent = AssistantAgent("weather", client(), output_content_type=Weather)
    answer = await agent.run(task="What is the weather in Paris?")
    assert isinstance(answer.messages[-1].content, Weather)


@check
async def an_assistant_with_tools_whose_answer_is_structured() -> None:
    agent = AssistantAgent("weather", client(), tools=[TOOL], output_content_type=Weather, reflect_on_tool_use=True)
    answer = await agent.run(task="What is the weather in Paris?")
    assert isinstance(answer.messages[-1].content, Weather)


run()
