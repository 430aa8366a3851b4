"""LangChain's ChatOpenAI, agents and vectors: https://docs.langchain.com/oss/python/integrations/chat/openai."""

from typing import Any, Literal

from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langgraph.errors import GraphRecursionError
from party import API_KEY, BASE_URL, MODEL, check, run
from pydantic import BaseModel, Field


class Weather(BaseModel):
    """What the weather is like."""

    city: Literal["Paris", "Rome"] = Field(description="the city")
    is_sunny: bool


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"It is sunny in {city}."


def chat(**options: Any) -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, base_url=BASE_URL, api_key=API_KEY, max_tokens=200, **options)


def structured(method: str, **options: Any) -> None:
    model = chat().with_structured_output(Weather, method=method, **options)
    assert isinstance(model.invoke("The weather in Paris is sunny. Answer as JSON."), Weather)


@check
def structured_by_a_json_schema() -> None:
    structured("json_schema")
    structured("json_schema", strict=True)


@check
def structured_by_calling_a_function() -> None:
    structured("function_calling")
    structured("function_calling", strict=True)


@check
def structured_by_json_mode() -> None:
    """The mode says only that it is JSON, so that the model may say what is not in the schema."""
    model = chat(temperature=1).with_structured_output(Weather, method="json_mode", include_raw=True)
    answer = model.invoke("The weather in Paris is sunny. Answer as JSON.")
    assert str(answer["raw"].content).startswith("{")


@check
def streamed_structures() -> None:
    *_, last = chat().with_structured_output(Weather).stream("The weather in Paris is sunny.")
    assert isinstance(last, Weather)


@check
def bound_tools_and_a_second_turn() -> None:
    model = chat().bind_tools([get_weather], tool_choice="any")
    asked = HumanMessage("What is the weather in Paris?")
    answer = model.invoke([asked])
    assert answer.tool_calls and not answer.invalid_tool_calls
    results = [get_weather.invoke(call) for call in answer.tool_calls]
    assert all(isinstance(result, ToolMessage) for result in results)
    second = chat().bind_tools([get_weather], tool_choice="none").invoke([asked, answer, *results])
    assert isinstance(second.content, str) and not second.tool_calls


@check
def streamed_calls() -> None:
    model = chat().bind_tools([get_weather], tool_choice="get_weather", parallel_tool_calls=False)
    whole = AIMessageChunk("")
    for chunk in model.stream("What is the weather in Paris?"):
        whole += chunk
    (call,) = whole.tool_calls
    assert call["name"] == "get_weather" and call["args"]["city"] in ("Paris", "Rome")


@check
def an_agent() -> None:
    agent = create_agent(chat(), tools=[get_weather], system_prompt="Be brief.")
    state = agent.invoke({"messages": [HumanMessage("What is the weather in Paris?")]}, {"recursion_limit": 8})
    assert state["messages"][-1].type == "ai"


@check
def an_agent_whose_answer_is_structured() -> None:
    agent = create_agent(chat(), tools=[get_weather], response_format=ProviderStrategy(Weather))
    state = agent.invoke({"messages": [HumanMessage("What is the weather in Paris?")]}, {"recursion_limit": 8})
    assert isinstance(state["structured_response"], Weather)


@check
def an_agent_whose_answer_is_a_call() -> None:
    """The model has to call a tool in each turn, and may choose the one that ends the run too late."""
    agent = create_agent(chat(), tools=[get_weather], response_format=ToolStrategy(Weather))
    try:
        state = agent.invoke({"messages": [HumanMessage("What is the weather in Paris?")]}, {"recursion_limit": 8})
        assert isinstance(state["structured_response"], Weather)
    except GraphRecursionError as error:
        print(error)


def embeddings(**options: Any) -> OpenAIEmbeddings:
    """As its documentation has it for servers other than OpenAI's: it would cut texts to tokens of OpenAI's models."""
    return OpenAIEmbeddings(
        model=MODEL, base_url=BASE_URL, api_key=API_KEY, check_embedding_ctx_length=False, **options
    )


@check
async def vectors_of_texts() -> None:
    model = embeddings()
    one, other = model.embed_documents(["def add(a, b):", "import os"])
    assert model.embed_query("def add(a, b):") == one != other
    assert await model.aembed_query("import os") == other
    assert len(embeddings(dimensions=16).embed_query("import os")) == 16


@check
def vectors_of_many_documents() -> None:
    found = embeddings(chunk_size=100).embed_documents([f"def f{i}(x):" for i in range(250)])
    assert len({tuple(one) for one in found}) == 250
    assert embeddings().embed_query("def f77(x):") == found[77]


run()
