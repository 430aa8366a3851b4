"""Simon Willison's `llm`, as a program and from Python: https://llm.datasette.io/en/stable/other-models.html."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

from party import BASE_URL, MODEL, check, program, run
from pydantic import BaseModel

folder = Path(tempfile.mkdtemp())
os.environ["LLM_USER_PATH"] = str(folder)
ABILITIES = {
    "chat": "supports_tools: true, supports_schema: true",
    "whole": "can_stream: false, supports_schema: true",
    "text": "completion: true",
    "responses": "responses: true, supports_tools: true, supports_schema: true",
}
MODELS = [
    f"- {{model_id: {name}, model_name: {MODEL}, api_base: {BASE_URL}, {abilities}}}\n"
    for name, abilities in ABILITIES.items()
]
(folder / "extra-openai-models.yaml").write_text("".join(MODELS))

import llm  # noqa: E402  # it reads the file above as it is imported

QUESTION = "What is the weather in Paris?"
LIMIT = ("-o", "max_tokens", "60")


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    is_sunny: bool


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    return f"It is sunny in {city}."


def ask(model: str, **options: Any) -> Any:
    return llm.get_model(model).prompt(QUESTION, max_tokens=200, **options)


@check
def the_program_asks_and_goes_on() -> None:
    for model, *system in (("chat", "-s", "Be brief."), ("whole", "-s", "Be brief."), ("text",)):
        assert program("llm", "-m", model, *system, *LIMIT, QUESTION).strip()
    assert program("llm", "-c", *LIMIT, "And in Rome?").strip()
    logged = json.loads(program("llm", "logs", "-n", "4", "--json"))
    assert [entry["model"] for entry in logged] == ["chat", "whole", "text", "text"]
    assert all(entry["output_tokens"] for entry in logged if entry["model"] != "text"), logged


@check
def the_program_has_a_schema() -> None:
    printed = program("llm", "-m", "chat", "--schema", json.dumps(Weather.model_json_schema()), QUESTION)
    assert Weather.model_validate_json(printed)


@check
def a_schema_from_python() -> None:
    for model in ("chat", "whole", "responses"):
        assert Weather.model_validate_json(ask(model, schema=Weather).text()), model


@check
def streams() -> None:
    for model in ("chat", "text", "responses"):
        answer = ask(model)
        pieces = list(answer)
        assert len(pieces) > 1 and "".join(pieces) == answer.text(), model


@check
def tools() -> None:
    """The model need not call, and may not end; what it calls is run, and the chain goes on."""
    for model in ("chat", "responses"):
        talk = llm.get_model(model).conversation(tools=[get_weather], chain_limit=3)
        chain = talk.chain(QUESTION, options={"max_tokens": 200})
        try:
            assert isinstance(chain.text(), str)
        except ValueError as error:
            assert "Chain limit" in str(error), error


@check
def a_conversation_has_memory() -> None:
    talk = llm.get_model("chat").conversation()
    first = talk.prompt(QUESTION, max_tokens=24)
    first.text()
    second = talk.prompt("And in Rome?", max_tokens=24)
    second.text()
    assert second.usage().input > first.usage().input


@check
async def asynchronously() -> None:
    assert await llm.get_async_model("chat").prompt(QUESTION, max_tokens=24).text()


run()
