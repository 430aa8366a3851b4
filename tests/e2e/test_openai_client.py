"""The official client against the bundled model: unchanged, sync, async and streaming."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from tests.e2e.conftest import API_KEYS
from tests.e2e.harness import PATIENCE, Server

PROMPT = "def add(a, b):"
MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say something."}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 1234, "max_tokens": 24}
MODEL = "shoal-moe"


@pytest.fixture(scope="module")
def client(main: Server) -> Iterator[openai.OpenAI]:
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(
        base_url=f"{main.url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE, http_client=http
    ) as made:
        yield made


def extras(model: Any) -> set[str]:
    """Names of fields, at any depth, that OpenAI's published types do not know."""
    if isinstance(model, BaseModel):
        found = set(model.model_extra or {})
        return found.union(*(extras(getattr(model, name)) for name in type(model).model_fields))
    if isinstance(model, list):
        return set().union(*map(extras, model))
    return set()


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_streamed_completion_is_the_whole_one_in_pieces(client: openai.OpenAI, params: dict[str, Any]) -> None:
    whole = client.completions.create(model=MODEL, prompt=PROMPT, **params)
    assert (whole.object, whole.model, whole.choices[0].index) == ("text_completion", MODEL, 0)
    assert whole.usage is not None and 0 < whole.usage.completion_tokens <= 24
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert extras(whole) == {"seed"}
    Completion.model_validate(whole.model_dump(), strict=True)

    *chunks, last = client.completions.create(
        model=MODEL, prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **params
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert last.choices == [] and last.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in [*chunks, last]}) == 1


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_streamed_chat_is_the_whole_one_in_pieces(client: openai.OpenAI, params: dict[str, Any]) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, **params)
    assert (whole.object, whole.model, whole.choices[0].message.role) == ("chat.completion", MODEL, "assistant")
    assert extras(whole) == {"seed"}
    ChatCompletion.model_validate(whole.model_dump(), strict=True)

    chunks = list(client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **params))
    assert extras(chunks) == {"seed"}
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert [delta.role for delta in deltas if delta.role] == ["assistant"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.choices[0].finish_reason


def test_the_clients_own_accumulation_of_a_stream(client: openai.OpenAI) -> None:
    text = client.chat.completions.create(model=MODEL, messages=MESSAGES, **GREEDY).choices[0].message.content
    params: dict[str, Any] = GREEDY | {"stop": [(text or "x")[-1]]}  # it takes an answer cut at its limit for a failure
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, **params)
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, stream_options={"include_usage": True}, **params
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.usage is not None and whole.usage is not None
    assert final.usage.total_tokens == whole.usage.total_tokens


def test_the_asynchronous_client(main: Server, client: openai.OpenAI) -> None:
    async def ask() -> tuple[str, str, str]:
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(
            base_url=f"{main.url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE, http_client=http
        ) as made:
            whole, stream = await asyncio.gather(
                made.completions.create(model=MODEL, prompt=PROMPT, **GREEDY),
                made.completions.create(model=MODEL, prompt=PROMPT, stream=True, **GREEDY),
            )
            text = "".join([chunk.choices[0].text async for chunk in stream])
            chat = await made.chat.completions.create(model=MODEL, messages=MESSAGES, **GREEDY)
            return whole.choices[0].text, text, chat.choices[0].message.content or ""

    whole, streamed, chat = asyncio.run(ask())
    assert whole == streamed == client.completions.create(model=MODEL, prompt=PROMPT, **GREEDY).choices[0].text
    assert chat == client.chat.completions.create(model=MODEL, messages=MESSAGES, **GREEDY).choices[0].message.content


def test_parameters_that_only_vllm_knows_go_in_extra_body(client: openai.OpenAI) -> None:
    extra = {"top_k": 1, "ignore_eos": True, "min_tokens": 24}
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=1, extra_body=extra)
    assert answer.usage is not None and answer.usage.completion_tokens == 24


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "shoal")
    assert client.models.retrieve(MODEL) == model
    assert extras(model) == {"root", "max_model_len", "capabilities", "display_name", "created_at", "type"}


def test_errors_are_of_the_clients_own_types(client: openai.OpenAI, strict: Server) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt=PROMPT)
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError, match="max_tokens can be at most") as too_long:
        client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=10**6)
    assert (too_long.value.param, too_long.value.code) == ("max_tokens", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError, match="n: ") as wrong:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, n=0, stream=True)
    assert wrong.value.param == "n"

    for key, is_known in ((API_KEYS[0], True), ("wrong", False)):
        http = openai.DefaultHttpxClient(trust_env=False)
        with openai.OpenAI(base_url=f"{strict.url}/v1", api_key=key, max_retries=0, http_client=http) as other:
            if is_known:
                assert other.models.list().data
            else:
                with pytest.raises(openai.AuthenticationError) as refused:
                    other.models.list()
                assert refused.value.code == "invalid_api_key"
