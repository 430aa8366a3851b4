"""Outlines over a server: https://dottxt-ai.github.io/outlines/latest/features/models/openai_compatible."""

from enum import Enum
from typing import Literal

import openai
import outlines
from outlines.inputs import Chat
from outlines.types import CFG, Regex
from party import MODEL, check, run
from pydantic import BaseModel

QUESTION = "What is the weather in Paris?"


class City(Enum):
    PARIS = "Paris"
    ROME = "Rome"


class Weather(BaseModel):
    city: City
    is_sunny: bool


@check
def a_pydantic_model() -> None:
    model = outlines.from_openai(openai.OpenAI(), MODEL)
    assert Weather.model_validate_json(model(QUESTION, Weather, max_tokens=200))


@check
def a_chat_whose_answer_is_streamed() -> None:
    model = outlines.from_openai(openai.OpenAI(), MODEL)
    chat = Chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}])
    assert Weather.model_validate_json("".join(model.stream(chat, Weather, max_tokens=200)))


@check
def what_vllm_takes_is_taken() -> None:
    model = outlines.from_vllm(openai.OpenAI(), MODEL)
    assert Weather.model_validate_json(model(QUESTION, Weather, max_tokens=200))
    assert model(QUESTION, Literal["Paris", "Rome"], max_tokens=20) in ("Paris", "Rome")
    assert model(QUESTION, Regex(r"[0-9]{3}"), max_tokens=20).isdigit()
    assert model(QUESTION, CFG('start: "yes" | "no"'), max_tokens=20) in ("yes", "no")


@check
async def asynchronously() -> None:
    model = outlines.from_vllm(openai.AsyncOpenAI(), MODEL)
    assert Weather.model_validate_json(await model(QUESTION, Weather, max_tokens=200))


run()
