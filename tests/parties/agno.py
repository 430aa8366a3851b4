"""Agno's agents: https://docs.agno.com/models/providers/openai-like."""

from typing import Any, Literal

from agno.agent import Agent, RunOutput
from agno.models.openai.like import OpenAILike
from agno.models.vllm import VLLM
from party import API_KEY, BASE_URL, MODEL, check, run
from pydantic import BaseModel

QUESTION = "What is the weather in Paris?"


class Weather(BaseModel):
    """What the weather is like."""

    city: Literal["Paris", "Rome"]
    is_sunny: bool


def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: Paris or Rome
    """
    return f"It is sunny in {city}."


def agent(tool_choice: Any = None, **options: Any) -> Agent:
    model = OpenAILike(id=MODEL, base_url=BASE_URL, api_key=API_KEY, max_tokens=200)
    return Agent(model=model, tool_choice=tool_choice, tool_call_limit=2, telemetry=False, **options)


@check
def text() -> None:
    assert isinstance(agent().run(QUESTION).content, str)


@check
def a_structured_answer() -> None:
    assert isinstance(agent(output_schema=Weather).run(QUESTION).content, Weather)


@check
def a_structured_answer_beside_tools() -> None:
    assert isinstance(agent(tools=[get_weather], output_schema=Weather).run(QUESTION).content, Weather)


@check
def json_mode() -> None:
    """The schema stands in the prompt, which a small model may not heed: then the content stays text."""
    answer = agent(output_schema=Weather, use_json_mode=True).run(QUESTION).content
    assert isinstance(answer, Weather | str)


@check
def tools() -> None:
    answer = agent(tools=[get_weather]).run(QUESTION)
    assert answer.status.value == "COMPLETED"


@check
def streamed_tools() -> None:
    events = list(agent(tools=[get_weather]).run(QUESTION, stream=True, stream_events=True, yield_run_output=True))
    assert isinstance(events[-1], RunOutput)


@check
async def asynchronously_by_the_class_for_vllm() -> None:
    model = VLLM(id=MODEL, base_url=BASE_URL, api_key=API_KEY, max_tokens=200)
    answer = await Agent(model=model, output_schema=Weather, telemetry=False).arun(QUESTION)
    assert isinstance(answer.content, Weather)


run()
