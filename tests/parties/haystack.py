"""Haystack's OpenAIChatGenerator and Agent: https://docs.haystack.deepset.ai/docs/openaichatgenerator."""

from typing import Annotated, Any, Literal

from haystack.components.agents import Agent
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage, Document, StreamingChunk
from haystack.tools import tool
from haystack.utils import Secret
from party import API_KEY, BASE_URL, MODEL, check, run
from pydantic import BaseModel

QUESTION = ChatMessage.from_user("What is the weather in Paris?")


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    is_sunny: bool


@tool
def get_weather(city: Annotated[Literal["Paris", "Rome"], "the city"]) -> str:
    """The weather of a city."""
    return f"It is sunny in {city}."


def generator(**options: Any) -> OpenAIChatGenerator:
    settings = {"max_tokens": 200} | options.pop("generation_kwargs", {})
    key = Secret.from_token(API_KEY)
    return OpenAIChatGenerator(api_key=key, api_base_url=BASE_URL, model=MODEL, generation_kwargs=settings, **options)


@check
def a_structured_answer() -> None:
    answer = generator(generation_kwargs={"response_format": Weather}).run([QUESTION])["replies"][0]
    assert Weather.model_validate_json(answer.text)


@check
def calls_and_a_second_turn() -> None:
    for strict in (False, True):
        asked = generator(tools=[get_weather], tools_strict=strict, generation_kwargs={"tool_choice": "required"})
        answer = asked.run([QUESTION])["replies"][0]
        assert answer.tool_calls and answer.tool_calls[0].arguments["city"] in ("Paris", "Rome")
        results = [
            ChatMessage.from_tool(get_weather.invoke(**call.arguments), origin=call) for call in answer.tool_calls
        ]
        second = generator(tools=[get_weather]).run([QUESTION, answer, *results])["replies"][0]
        assert second.text is not None or second.tool_calls


@check
def streamed_calls() -> None:
    chunks: list[StreamingChunk] = []
    asked = generator(
        tools=[get_weather], streaming_callback=chunks.append, generation_kwargs={"tool_choice": "required"}
    )
    answer = asked.run([QUESTION])["replies"][0]
    assert answer.tool_calls and any(chunk.tool_calls for chunk in chunks)


@check
def an_agent() -> None:
    agent = Agent(chat_generator=generator(), tools=[get_weather], system_prompt="Be brief.", max_agent_steps=4)
    assert agent.run(messages=[QUESTION])["messages"]


@check
def an_agent_that_has_to_call() -> None:
    required = generator(generation_kwargs={"tool_choice": "required"})
    agent = Agent(chat_generator=required, tools=[get_weather], exit_conditions=["get_weather"], max_agent_steps=4)
    last = agent.run(messages=[QUESTION])["messages"][-1]
    assert last.tool_call_results[0].result.startswith("It is sunny in ")


@check
def vectors_of_texts_and_documents() -> None:
    settings: dict[str, Any] = {"api_key": Secret.from_token(API_KEY), "api_base_url": BASE_URL, "model": MODEL}
    found = OpenAITextEmbedder(**settings, dimensions=32).run("import os")["embedding"]
    documents = [Document(content="import os"), Document(content="def add(a, b):")]
    embedded = OpenAIDocumentEmbedder(**settings, dimensions=32).run(documents)["documents"]
    assert [document.embedding == found for document in embedded] == [True, False]


run()
