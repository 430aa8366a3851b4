"""Instructor and its modes: https://python.useinstructor.com/concepts/patching."""

from typing import Literal

import instructor
import openai
from instructor import Mode
from instructor.core.exceptions import IncompleteOutputException, InstructorRetryException
from party import MODEL, check, run
from pydantic import BaseModel, Field, field_validator

MESSAGES = [{"role": "user", "content": "The weather in Paris is sunny. Extract it."}]


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    is_sunny: bool
    words: list[Literal["warm", "cold"]] = Field(max_length=3)


def extract(mode: Mode) -> None:
    client = instructor.from_openai(openai.OpenAI(), mode=mode)
    answer, completion = client.create_with_completion(
        model=MODEL, messages=MESSAGES, response_model=Weather, max_tokens=200, max_retries=0
    )
    assert isinstance(answer, Weather)
    assert completion.usage.completion_tokens > 0


@check
def tools() -> None:
    extract(Mode.TOOLS)


@check
def strict_tools() -> None:
    extract(Mode.TOOLS_STRICT)


@check
def json_schema() -> None:
    extract(Mode.JSON_SCHEMA)


def try_to_extract(mode: Mode) -> None:
    """The schema stands in the prompt alone, which a small model may not heed: then Instructor says so."""
    try:
        extract(mode)
    except (IncompleteOutputException, InstructorRetryException) as error:
        assert error.last_completion is not None, error


@check
def json() -> None:
    try_to_extract(Mode.JSON)


@check
def json_in_markdown() -> None:
    try_to_extract(Mode.MD_JSON)


@check
def retries_send_back_what_was_wrong() -> None:
    class Impossible(BaseModel):
        city: Literal["Paris", "Rome"]

        @field_validator("city")
        @classmethod
        def refuse(cls, city: str) -> str:
            raise ValueError(f"{city} is no city")

    for mode in (Mode.TOOLS, Mode.JSON_SCHEMA):
        client = instructor.from_openai(openai.OpenAI(), mode=mode)
        try:
            client.create(model=MODEL, messages=MESSAGES, response_model=Impossible, max_tokens=200, max_retries=2)
        except InstructorRetryException as error:
            assert "is no city" in str(error), error
        else:
            raise AssertionError("what the validator refuses was taken")


@check
def partial_objects_as_they_come() -> None:
    client = instructor.from_openai(openai.OpenAI(), mode=Mode.TOOLS)
    *_, last = client.create_partial(model=MODEL, messages=MESSAGES, response_model=Weather, max_tokens=200)
    assert isinstance(last.is_sunny, bool)


@check
async def asynchronously() -> None:
    client = instructor.from_openai(openai.AsyncOpenAI(), mode=Mode.JSON_SCHEMA)
    answer = await client.create(model=MODEL, messages=MESSAGES, response_model=Weather, max_tokens=200)
    assert isinstance(answer, Weather)


run()
