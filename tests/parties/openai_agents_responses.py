"""OpenAI's Agents SDK with its default, the Responses API: https://openai.github.io/openai-agents-python/quickstart."""

from typing import Literal

from agents import Agent, ModelSettings, Runner, function_tool
from agents.exceptions import MaxTurnsExceeded
from party import MODEL, check, run
from pydantic import BaseModel

QUESTION = "What is the weather in Paris?"


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    is_sunny: bool


@function_tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"It is sunny in {city}."


def settings(tool_choice: str | None = None) -> ModelSettings:
    # An answer of more tokens is incomplete, a failure for the SDK: with this seed the small model ends before.
    return ModelSettings(max_tokens=200, tool_choice=tool_choice, extra_body={"seed": 1})


@check
async def a_tool_is_called_and_its_result_is_read() -> None:
    agent = Agent(
        name="Weather", instructions="Be brief.", model=MODEL, tools=[get_weather], model_settings=settings("required")
    )
    result = await Runner.run(agent, QUESTION, max_turns=4)
    assert isinstance(result.final_output, str)
    assert {"tool_call_item", "tool_call_output_item"} <= {item.type for item in result.new_items}


@check
async def a_result_may_be_the_answer() -> None:
    agent = Agent(
        name="Weather",
        model=MODEL,
        tools=[get_weather],
        model_settings=settings("get_weather"),
        tool_use_behavior="stop_on_first_tool",
    )
    result = await Runner.run(agent, QUESTION)
    assert result.final_output.startswith("It is sunny in ")


@check
async def a_structured_answer() -> None:
    agent = Agent(name="Weather", model=MODEL, output_type=Weather, model_settings=settings())
    result = await Runner.run(agent, QUESTION)
    assert isinstance(result.final_output, Weather)


@check
async def a_structured_answer_beside_tools() -> None:
    agent = Agent(name="Weather", model=MODEL, tools=[get_weather], output_type=Weather, model_settings=settings())
    try:
        result = await Runner.run(agent, QUESTION, max_turns=4)
        assert isinstance(result.final_output, Weather)
    except MaxTurnsExceeded as error:
        print(error)


@check
async def a_hand_over_to_another_agent() -> None:
    other = Agent(name="Rome", handoff_description="knows Rome", instructions="Be brief.", model=MODEL)
    other.model_settings = settings()
    first = Agent(name="Triage", model=MODEL, handoffs=[other], model_settings=settings("required"))
    result = await Runner.run(first, QUESTION, max_turns=4)
    assert result.last_agent is other and isinstance(result.final_output, str)


@check
async def a_streamed_run() -> None:
    agent = Agent(name="Weather", model=MODEL, tools=[get_weather], model_settings=settings("required"))
    result = Runner.run_streamed(agent, QUESTION, max_turns=4)
    types = [event.type async for event in result.stream_events()]
    assert "raw_response_event" in types and isinstance(result.final_output, str)


@check
async def the_next_turn_has_the_history() -> None:
    agent = Agent(name="Weather", model=MODEL, tools=[get_weather], model_settings=settings("required"))
    first = await Runner.run(agent, QUESTION, max_turns=4)
    again = await Runner.run(agent, [*first.to_input_list(), {"role": "user", "content": "And in Rome?"}], max_turns=4)
    assert isinstance(again.final_output, str)


@check
async def the_next_turn_names_the_response_before() -> None:
    agent = Agent(name="Weather", model=MODEL, tools=[get_weather], model_settings=settings())
    first = await Runner.run(agent, QUESTION, max_turns=4, auto_previous_response_id=True)
    again = await Runner.run(agent, "And in Rome?", previous_response_id=first.last_response_id, max_turns=4)
    assert isinstance(again.final_output, str)


run()
