"""Pydantic AI: tools, and its three output modes: https://ai.pydantic.dev/output."""

from typing import Any, Literal

from party import API_KEY, BASE_URL, MODEL, check, run
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.exceptions import UnexpectedModelBehavior, UsageLimitExceeded
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.usage import UsageLimits

CHAT = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE_URL, api_key=API_KEY))
QUESTION = "What is the weather in Paris?"
LIMITS = UsageLimits(request_limit=4)


class Weather(BaseModel):
    """What the weather is like."""

    city: Literal["Paris", "Rome"]
    is_sunny: bool


def agent(**options: Any) -> Agent[None, Any]:
    return Agent(CHAT, model_settings={"max_tokens": 200}, **options)


@check
def text() -> None:
    assert isinstance(agent(instructions="Be brief.").run_sync(QUESTION).output, str)


@check
def output_as_a_tool() -> None:
    answer = agent(output_type=ToolOutput(Weather)).run_sync(QUESTION)
    assert isinstance(answer.output, Weather)


@check
def native_output() -> None:
    for strict in (True, False):
        answer = agent(output_type=NativeOutput(Weather, strict=strict)).run_sync(QUESTION)
        assert isinstance(answer.output, Weather)


@check
def prompted_output() -> None:
    """The schema stands in the prompt, and JSON of any schema is asked for."""
    try:
        agent(output_type=PromptedOutput(Weather)).run_sync(QUESTION, usage_limits=LIMITS)
    except UnexpectedModelBehavior as error:
        print(error)


@check
def tools_and_an_output_that_is_one() -> None:
    """The model has to call one of both, and may choose the wrong one until the limit."""
    asked = agent(output_type=ToolOutput(Weather))

    @asked.tool_plain
    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather of a city."""
        return f"It is sunny in {city}."

    try:
        assert isinstance(asked.run_sync(QUESTION, usage_limits=LIMITS).output, Weather)
    except UsageLimitExceeded as error:
        print(error)


@check
def tools_beside_native_output() -> None:
    asked = agent(output_type=NativeOutput(Weather))

    @asked.tool_plain
    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather of a city."""
        return f"It is sunny in {city}."

    assert isinstance(asked.run_sync(QUESTION, usage_limits=LIMITS).output, Weather)


@check
async def streamed_output() -> None:
    async with agent(output_type=NativeOutput(Weather)).run_stream(QUESTION) as stream:
        assert isinstance(await stream.get_output(), Weather)
    async with agent(output_type=ToolOutput(Weather)).run_stream(QUESTION) as stream:
        assert isinstance(await stream.get_output(), Weather)


@check
def the_next_turn_has_the_history() -> None:
    first = agent(output_type=ToolOutput(Weather)).run_sync(QUESTION)
    second = agent().run_sync("Thank you.", message_history=first.all_messages())
    assert isinstance(second.output, str)


run()
