"""smolagents: both kinds of agents: https://huggingface.co/docs/smolagents."""

from typing import Any

from party import API_KEY, BASE_URL, MODEL, check, run
from smolagents import ChatMessage, CodeAgent, OpenAIModel, Tool, ToolCallingAgent


class GetWeather(Tool):
    name = "get_weather"
    description = "The weather of a city."
    inputs = {"city": {"type": "string", "description": "the city", "enum": ["Paris", "Rome"]}}  # noqa: RUF012
    output_type = "string"

    def forward(self, city: str) -> str:
        return f"It is sunny in {city}."


def model(**options: Any) -> OpenAIModel:
    return OpenAIModel(model_id=MODEL, api_base=BASE_URL, api_key=API_KEY, max_tokens=200, **options)


@check
def a_chat() -> None:
    answer = model().generate([{"role": "user", "content": [{"type": "text", "text": "Say something."}]}])
    assert isinstance(answer, ChatMessage) and isinstance(answer.content, str)


@check
def an_agent_that_calls_tools() -> None:
    agent = ToolCallingAgent(tools=[GetWeather()], model=model(), max_steps=3)
    assert agent.run("What is the weather in Paris?") is not None
    calls = [call for step in agent.memory.steps for call in getattr(step, "tool_calls", None) or []]
    assert calls and {call.name for call in calls} <= {"get_weather", "final_answer"}


@check
def an_agent_that_calls_tools_as_a_stream() -> None:
    agent = ToolCallingAgent(tools=[GetWeather()], model=model(), max_steps=2, stream_outputs=True)
    assert list(agent.run("What is the weather in Paris?", stream=True))


@check
def an_agent_that_writes_code() -> None:
    agent = CodeAgent(tools=[GetWeather()], model=model(), max_steps=3)
    assert agent.run("What is the weather in Paris?") is not None


@check
def an_agent_that_writes_code_in_json() -> None:
    """The step is JSON of a schema: a thought, and code."""
    agent = CodeAgent(tools=[GetWeather()], model=model(), max_steps=2, use_structured_outputs_internally=True)
    assert agent.run("What is the weather in Paris?") is not None


run()
