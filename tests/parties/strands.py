"""Strands' agents: https://strandsagents.com/latest/documentation/docs/user-guide/concepts/model-providers/openai."""

from typing import Any, Literal

from party import API_KEY, BASE_URL, MODEL, check, run
from pydantic import BaseModel
from strands import Agent, tool
from strands.models.openai import OpenAIModel

QUESTION = "What is the weather in Paris?"


class Weather(BaseModel):
    """What the weather is like."""

    city: Literal["Paris", "Rome"]
    is_sunny: bool


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"It is sunny in {city}."


def agent(**options: Any) -> Agent:
    """An agent whose texts end soon: Strands takes an answer cut at `max_tokens` for an error."""
    model = OpenAIModel(
        client_args={"api_key": API_KEY, "base_url": BASE_URL},
        model_id=MODEL,
        params={"max_tokens": 400, "temperature": 0, "stop": ["."]},
    )
    return Agent(model=model, callback_handler=None, **options)


@check
def text() -> None:
    assert agent()(QUESTION).stop_reason in ("end_turn", "stop_sequence")


@check
def structured_output_by_a_tool() -> None:
    """It is demanded once the model has said something else."""
    assert isinstance(agent()(QUESTION, structured_output_model=Weather).structured_output, Weather)


@check
async def structured_output_of_the_model() -> None:
    messages: Any = [{"role": "user", "content": [{"text": QUESTION}]}]
    *_, last = [event async for event in agent().model.structured_output(Weather, messages)]
    assert isinstance(last["output"], Weather)


@check
def a_tool_is_called_and_its_result_is_read() -> None:
    asked = agent(tools=[get_weather], system_prompt="Be brief.")
    asked.messages = [
        {"role": "user", "content": [{"text": QUESTION}]},
        {
            "role": "assistant",
            "content": [{"toolUse": {"toolUseId": "1", "name": "get_weather", "input": {"city": "Rome"}}}],
        },
        {
            "role": "user",
            "content": [{"toolResult": {"toolUseId": "1", "status": "success", "content": [{"text": "sunny"}]}}],
        },
    ]
    assert asked("And in Paris?").message["role"] == "assistant"


@check
async def streamed() -> None:
    events = [event async for event in agent(tools=[get_weather]).stream_async(QUESTION)]
    assert "result" in events[-1]


run()
