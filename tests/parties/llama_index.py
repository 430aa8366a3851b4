"""LlamaIndex's OpenAILike and OpenAILikeEmbedding: https://developers.llamaindex.ai/python/examples/llm/openai_like."""

import asyncio
from typing import Any, Literal

from llama_index.core import VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import TextNode
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from party import API_KEY, BASE_URL, MODEL, check, run
from pydantic import BaseModel


class Weather(BaseModel):
    """What the weather is like."""

    city: Literal["Paris", "Rome"]
    is_sunny: bool


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"It is sunny in {city}."


TOOL = FunctionTool.from_defaults(get_weather)
QUESTION = "What is the weather in Paris?"


def llm(**options: Any) -> OpenAILike:
    defaults = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 4096, "max_tokens": 200}
    return OpenAILike(model=MODEL, api_base=BASE_URL, api_key=API_KEY, **defaults | options)


@check
def structured_by_calling_a_function() -> None:
    answer = llm().structured_predict(Weather, PromptTemplate("{question}"), question=QUESTION)
    assert isinstance(answer, Weather)


@check
def structured_by_a_response_format() -> None:
    model = llm(should_use_structured_outputs=True).as_structured_llm(Weather)
    assert isinstance(model.chat([ChatMessage(QUESTION)]).raw, Weather)


@check
def calls_and_a_second_turn() -> None:
    model = llm()
    answer = model.chat_with_tools([TOOL], user_msg=QUESTION, tool_required=True, allow_parallel_tool_calls=True)
    calls = model.get_tool_calls_from_response(answer)
    assert {call.tool_name for call in calls} == {"get_weather"}
    results = [
        ChatMessage(
            TOOL(**call.tool_kwargs).content,
            role="tool",
            additional_kwargs={"tool_call_id": call.tool_id, "name": call.tool_name},
        )
        for call in calls
    ]
    second = model.chat_with_tools([TOOL], chat_history=[ChatMessage(QUESTION), answer.message, *results])
    assert second.message.role == "assistant"


@check
def streamed_calls() -> None:
    model = llm()
    *_, last = model.stream_chat_with_tools([TOOL], user_msg=QUESTION, tool_required=True)
    assert model.get_tool_calls_from_response(last)


@check
async def an_agent() -> None:
    agent = FunctionAgent(tools=[TOOL], llm=llm(), system_prompt="Be brief.", timeout=120)
    answer = await asyncio.wait_for(agent.run(QUESTION, max_iterations=4, early_stopping_method="generate"), 120)
    assert isinstance(str(answer), str)


@check
async def an_index_of_vectors() -> None:
    model = OpenAILikeEmbedding(model_name=MODEL, api_base=BASE_URL, api_key=API_KEY, embed_batch_size=10)
    index = VectorStoreIndex([TextNode(text=f"def f{i}(x):") for i in range(25)], embed_model=model)
    (found,) = index.as_retriever(similarity_top_k=1).retrieve("def f7(x):")
    assert found.text == "def f7(x):"
    assert await model.aget_query_embedding("import os") == model.get_text_embedding("import os")


run()
