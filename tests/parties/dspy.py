"""DSPy's modules and adapters: https://dspy.ai/learn/programming/language_models."""

from typing import Any, Literal

import dspy
from dspy.utils.exceptions import AdapterParseError
from party import API_KEY, BASE_URL, MODEL, check, run
from pydantic import BaseModel

QUESTION = "What is the weather in Paris?"


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    is_sunny: bool


class Extract(dspy.Signature):
    """Extract the weather."""

    text: str = dspy.InputField()
    weather: Weather = dspy.OutputField()


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"It is sunny in {city}."


class AbleLM(dspy.LM):
    """Its catalogue does not know the model, and takes it for one that can do neither."""

    supports_function_calling = True
    supports_response_schema = True


def model(kind: type[dspy.LM] = AbleLM, **options: Any) -> dspy.LM:
    settings = {"max_tokens": 300, "temperature": 1.0} | options
    return kind(f"openai/{MODEL}", api_base=BASE_URL, api_key=API_KEY, cache=False, num_retries=0, **settings)


dspy.configure(lm=model())


@check
def models_of_each_kind() -> None:
    for kind in ("chat", "text", "responses"):
        (answer,) = model(model_type=kind)(QUESTION)
        assert isinstance(answer if isinstance(answer, str) else answer["text"], str), kind


@check
def a_model_that_is_not_in_the_catalogue() -> None:
    """It is asked for JSON alone, and a small one may not name the fields."""
    with dspy.context(lm=model(dspy.LM)):
        try:
            assert isinstance(dspy.Predict(Extract)(text="It is sunny in Paris.").weather, Weather)
        except AdapterParseError as error:
            print(error)


@check
def several_answers() -> None:
    assert len(model()(QUESTION, n=3)) == 3


@check
def structured_outputs() -> None:
    with dspy.context(adapter=dspy.JSONAdapter()):
        answer = dspy.Predict(Extract)(text="It is sunny in Paris.")
    assert isinstance(answer.weather, Weather)


@check
def the_default_adapter_falls_back_to_structured_outputs() -> None:
    """It asks for marks around the fields, which a small model does not write; then it asks for a schema."""
    answer = dspy.ChainOfThought("question -> is_sunny: bool")(question=QUESTION)
    assert isinstance(answer.is_sunny, bool)


@check
def tools_of_the_protocol() -> None:
    class Ask(dspy.Signature):
        question: str = dspy.InputField()
        tools: list[dspy.Tool] = dspy.InputField()
        calls: dspy.ToolCalls = dspy.OutputField()

    with dspy.context(adapter=dspy.ChatAdapter(use_native_function_calling=True), lm=model(tool_choice="required")):
        answer = dspy.Predict(Ask)(question=QUESTION, tools=[dspy.Tool(get_weather)])
    assert answer.calls.tool_calls[0].name == "get_weather"
    assert answer.calls.tool_calls[0].args["city"] in ("Paris", "Rome")


@check
def an_agent() -> None:
    """Arguments of any name have no schema that it sends, so that a small model may not name the fields."""
    try:
        answer = dspy.ReAct("question -> answer", tools=[get_weather], max_iters=2)(question=QUESTION)
        assert isinstance(answer.answer, str) and answer.trajectory
    except AdapterParseError as error:
        print(error)


@check
async def streams() -> None:
    stream = dspy.streamify(dspy.Predict("question -> answer"))(question=QUESTION)
    try:
        *_, last = [part async for part in stream]
        assert isinstance(last, dspy.Prediction)
    except (AdapterParseError, ExceptionGroup) as error:  # no marks around the fields
        print(error)


@check
def vectors() -> None:
    embedder = dspy.Embedder(f"openai/{MODEL}", api_base=BASE_URL, api_key=API_KEY, caching=False)
    one, other = embedder(["import os", "def add(a, b):"])
    assert len(one) == len(other) and list(one) != list(other)


run()
