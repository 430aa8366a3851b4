"""Vectors from the real server: the official client, ours, and transformers' hidden states."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from openai.types import CreateEmbeddingResponse
from transformers import AutoModelForCausalLM

from shoal import ShoalClient
from tests.e2e.harness import PATIENCE, Server, Waiting

TEXTS = ["the cat sat on the mat", "größer 楽しい naïve", "def add(a, b): return a + b"]


@pytest.fixture(scope="module")
def client(tiny: Server) -> Iterator[openai.OpenAI]:
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(
        base_url=f"{tiny.url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE, http_client=http
    ) as made:
        yield made


def embed(client: openai.OpenAI, inputs: Any, **options: Any) -> list[list[float]]:
    answer = client.embeddings.create(model="tiny", input=inputs, **options)
    assert [one.index for one in answer.data] == list(range(len(answer.data)))
    return [one.embedding for one in answer.data]


def test_the_official_clients_vectors_are_those_of_transformers(
    client: openai.OpenAI, tiny: Server, tiny_folder: Path
) -> None:
    """The client asks for base64 by itself, and for floats if it is told to."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    answer = client.embeddings.create(model="tiny", input=TEXTS)
    CreateEmbeddingResponse.model_validate(answer.model_dump(), strict=True)
    found = [one.embedding for one in answer.data]
    prompts = [tiny.post("/tokenize", prompt=text).json()["tokens"] for text in TEXTS]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, prompts))
    for prompt, vector in zip(prompts, found, strict=True):
        with torch.no_grad():
            state = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        np.testing.assert_allclose(vector, torch.nn.functional.normalize(state, dim=0).numpy(), atol=2e-5)
    assert embed(client, TEXTS, encoding_format="float") == found
    assert embed(client, prompts) == found
    assert [embed(client, text) for text in TEXTS] == [[vector] for vector in found]
    for vector, cut in zip(found, embed(client, TEXTS, dimensions=8), strict=True):
        np.testing.assert_allclose(cut, np.array(vector[:8]) / np.linalg.norm(vector[:8]), atol=1e-6)


def test_vectors_do_not_depend_on_what_else_is_computed(client: openai.OpenAI, tiny: Server) -> None:
    """To the bit, long inputs in chunks and in the cache too; and texts do not depend on vectors."""
    inputs = [*TEXTS, " ".join(TEXTS * 20), " ".join(TEXTS * 21)]
    alone = [embed(client, one)[0] for one in inputs]
    asked: dict[str, Any] = {"prompt": TEXTS[0], "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    text = tiny.text(**asked)
    others = [Waiting(tiny, "/v1/completions", **asked) for _ in range(4)]
    for _ in range(3):
        assert embed(client, inputs) == alone
    assert {other.answer().json()["choices"][0]["text"] for other in others} == {text}
    tiny.wait_idle()


def test_as_many_inputs_as_the_api_takes(client: openai.OpenAI, tiny: Server) -> None:
    """Twice at once, which is more than may wait."""
    inputs = [f"{i} cats" for i in range(2048)]
    other = Waiting(tiny, "/v1/embeddings", input=inputs, encoding_format="float")
    found = embed(client, inputs)
    assert [one["embedding"] for one in other.answer().json()["data"]] == found
    with ShoalClient(tiny.url) as ours:
        assert [list(one) for one in ours.embed(inputs[:3]).vectors] == found[:3]
    tiny.wait_idle()


def test_what_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="input: 2049 inputs, but at most 2048") as caught:
        embed(client, ["a"] * 2049)
    assert caught.value.param == "input"
    with pytest.raises(openai.BadRequestError, match="dimensions: 65 exceeds the model's 64") as caught:
        embed(client, "a", dimensions=65)
    assert caught.value.param == "dimensions"


def test_a_server_whose_engine_dies_gives_all_vectors(client: openai.OpenAI, tiny: Server) -> None:
    inputs = [" ".join([f"{i} cats", *TEXTS * 8]) for i in range(300)]
    expected = embed(client, inputs)
    asked = Waiting(tiny, "/v1/embeddings", input=inputs, encoding_format="float")
    tiny.until("it is busy", lambda: tiny.metric("num_requests_running"))
    os.kill(tiny.engine_pid(), signal.SIGKILL)
    assert [one["embedding"] for one in asked.answer().json()["data"]] == expected
