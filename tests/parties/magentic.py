"""magentic: functions whose bodies are prompts: https://magentic.dev."""

from typing import Literal

from magentic import AsyncStreamedStr, FunctionCall, OpenaiChatModel, StreamedStr, prompt, prompt_chain
from party import API_KEY, BASE_URL, MODEL, check, run
from pydantic import BaseModel

CHAT = OpenaiChatModel(MODEL, api_key=API_KEY, base_url=BASE_URL, max_tokens=200)


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    is_sunny: bool


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"It is sunny in {city}."


@check
def a_structured_answer() -> None:
    @prompt("What is the weather in {city}?", model=CHAT)
    def weather(city: str) -> Weather: ...

    assert isinstance(weather("Paris"), Weather)


@check
def a_number_and_a_list() -> None:
    @prompt("Is {city} in France?", model=CHAT)
    def is_in_france(city: str) -> bool: ...

    @prompt("Is Paris in France, and is Rome?", model=CHAT)
    def are_in_france() -> list[bool]: ...

    assert isinstance(is_in_france("Paris"), bool)
    assert isinstance(are_in_france(), list)


@check
def a_call() -> None:
    @prompt("What is the weather in {city}?", functions=[get_weather], model=CHAT)
    def weather(city: str) -> FunctionCall[str]: ...

    call = weather("Paris")
    assert call().startswith("It is sunny in ")


@check
def a_chain_of_calls() -> None:
    @prompt_chain("What is the weather in {city}?", functions=[get_weather], model=CHAT, max_calls=2)
    def weather(city: str) -> str: ...

    assert isinstance(weather("Paris"), str)


@check
def a_streamed_text() -> None:
    @prompt("Say something about {city}.", model=CHAT)
    def describe(city: str) -> StreamedStr: ...

    assert isinstance("".join(describe("Paris")), str)


@check
async def asynchronously() -> None:
    @prompt("Say something about {city}.", model=CHAT)
    async def describe(city: str) -> AsyncStreamedStr: ...

    assert isinstance("".join([part async for part in await describe("Paris")]), str)


run()
