"""Embeddings over an engine that plays a script: portions, what is refused, and lines of batches."""

from __future__ import annotations

import asyncio
import base64
import json
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal.model.checkpoint.pooling import load_pooling
from shoal.scheduler.errors import CheckpointError
from shoal.scheduler.output import FinishReason, Pooling, RequestOutput
from shoal.server.app import create_app
from shoal.server.embeddings import MOST_PORTIONS
from shoal.server.wire.batches import BatchBody
from shoal.server.wire.embeddings import MAX_INPUTS
from tests.server.test_batch_runner import LIMITS, ScriptedEngine, World, play, until

PATH = "/v1/embeddings"


def answer(engine: ScriptedEngine) -> None:
    """Give all requests that the engine has their vectors, in an order of its own: their first tokens."""
    requests = [engine.requests.pop(request_id) for request_id in reversed(list(engine.requests))]
    for request in requests:
        assert (request.params.max_tokens, request.speculates) == (0, False)
        pooling = request.params.pooling
        assert pooling is not None
        vector = array("f", (request.prompt_token_ids * 4)[: min(pooling.num_dimensions, 4)]).tobytes()
        engine.news(RequestOutput(request.request_id, [], FinishReason.LENGTH, embedding=vector))


@asynccontextmanager
async def serving(folder: Path, **server: Any) -> AsyncIterator[tuple[World, httpx.AsyncClient]]:
    world = World(folder, **server)
    await world.start()
    transport = httpx.ASGITransport(create_app(world.service))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield world, client
    await world.stop()


async def ask(world: World, client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    asking = asyncio.create_task(client.post(PATH, json=body))
    while not asking.done():
        answer(world.engine)
        await asyncio.sleep(0)
    return asking.result()


def test_the_shapes_of_inputs_and_answers(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving(tmp_path) as (world, client):
            response = await ask(world, client, input=[[5, 6, 7], [8]])
            said = response.json()
            assert response.headers["x-request-id"].startswith("embd-")
            assert (said["object"], said["model"]) == ("list", "shoal-moe")
            assert said["data"] == [
                {"index": 0, "embedding": [5.0, 6.0, 7.0, 5.0], "object": "embedding"},
                {"index": 1, "embedding": [8.0] * 4, "object": "embedding"},
            ]
            assert said["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
            for name, given, length in (
                ("one list of tokens", [5, 6, 7], 3),
                ("text", "ab", len(world.service.tokenizer.encode("ab"))),
                ("texts", ["ab"], len(world.service.tokenizer.encode("ab"))),
            ):
                said = (await ask(world, client, input=given)).json()
                assert (len(said["data"]), said["usage"]["total_tokens"]) == (1, length), name
            (one,) = (await ask(world, client, input=[5, 6], encoding_format="base64", dimensions=2)).json()["data"]
            assert base64.b64decode(one["embedding"]) == array("f", [5, 6]).tobytes()
            nulls = dict.fromkeys(("model", "encoding_format", "dimensions", "user", "truncate_prompt_tokens"))
            assert (await ask(world, client, input="a", **nulls)).status_code == 200

    play(scene())


def test_inputs_are_cut_where_the_call_says_so(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving(tmp_path) as (world, client):
            text, tokenizer = "def add(a, b): " * 500, world.service.tokenizer
            for most, length in ((3, 3), (1, 1), (-1, LIMITS.max_model_len), (LIMITS.max_model_len, 256)):
                for given in (text, [tokenizer.encode(text)]):
                    asking = asyncio.create_task(
                        client.post(PATH, json={"input": given, "truncate_prompt_tokens": most})
                    )
                    await until(lambda: world.engine.requests)
                    (request,) = world.engine.requests.values()
                    assert list(request.prompt_token_ids) == tokenizer.encode(text)[:length]
                    answer(world.engine)
                    assert (await asking).json()["usage"]["prompt_tokens"] == length

    play(scene())


BAD: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "nothing": ({}, "input", "missing required field: input"),
    "no input": ({"input": []}, "input", "input is empty"),
    "an empty text": ({"input": ""}, "input", "input is empty"),
    "one empty text": ({"input": ["a", ""]}, "input", "input[1] is empty"),
    "empty tokens": ({"input": [[1], []]}, "input", "input[1] is empty"),
    "a mixture": ({"input": ["a", 1]}, "input", "input: expected only texts"),
    "an object": ({"input": {"text": "a"}}, "input", "input: expected"),
    "an unknown token": ({"input": [1, 4096]}, "input", "input: token id 4096 is outside the vocabulary of 4096"),
    "a long text": ({"input": ["a", "b " * 300]}, "input", "input[1] has"),
    "a very long text": ({"input": "b " * 30_000}, "input", "input has 60000 characters"),
    "long tokens": ({"input": [1] * 257}, "input", "input has 257 tokens"),
    "many inputs": ({"input": ["a"] * 2049}, "input", "input: 2049 inputs, but at most 2048"),
    "a format": ({"input": "a", "encoding_format": "hex"}, "encoding_format", "encoding_format: expected 'base64'"),
    "dimensions": ({"input": "a", "dimensions": 513}, "dimensions", "dimensions: 513 exceeds the model's 512"),
    "no dimensions": ({"input": "a", "dimensions": 0}, "dimensions", "dimensions: expected"),
    "no tokens": ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "truncate_prompt_tokens"),
    "too many tokens": ({"input": "a", "truncate_prompt_tokens": 257}, "truncate_prompt_tokens", "exceeds the 256"),
    "another model": ({"input": "a", "model": "other"}, "model", "the model 'other' does not exist"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(name: str, tmp_path: Path) -> None:
    body, param, message = BAD[name]

    async def scene() -> None:
        async with serving(tmp_path) as (world, client):
            response = await client.post(PATH, json=body)
            error = response.json()["error"]
            assert response.status_code == (404 if name == "another model" else 400)
            assert error["param"] == param
            assert message in error["message"] and len(error["message"]) <= 300
            assert not world.engine.orders

    play(scene())


def test_many_inputs_go_to_the_engine_portion_by_portion(tmp_path: Path) -> None:
    """Others have the rest of the queue, and order stays."""
    inputs = [[1 + i % 50, i // 50] for i in range(MAX_INPUTS)]

    async def scene() -> None:
        async with serving(tmp_path) as (world, client):
            engine = world.engine
            world.interactive("a", "b")  # they stay
            asking = asyncio.create_task(client.post(PATH, json={"input": inputs}))
            await until(lambda: len(engine.requests) > 2)
            while not asking.done():
                mine = {name: one for name, one in engine.requests.items() if name.startswith("embd")}
                assert len(mine) <= MOST_PORTIONS * LIMITS.max_num_seqs
                for request_id in mine:
                    request = engine.requests.pop(request_id)
                    vector = array("f", request.prompt_token_ids).tobytes()
                    engine.news(RequestOutput(request_id, [], FinishReason.LENGTH, embedding=vector))
                await asyncio.sleep(0)
            data = asking.result().json()["data"]
            assert [one["embedding"] for one in data] == inputs
            assert [one["index"] for one in data] == list(range(MAX_INPUTS))
            assert engine.most <= LIMITS.max_num_seqs + LIMITS.max_num_waiting
            assert engine.orders.total() == MAX_INPUTS + 2, "none twice"

    play(scene())


def test_long_inputs_go_one_by_one_and_a_full_server_refuses_the_call(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving(tmp_path) as (world, client):
            asking = asyncio.create_task(client.post(PATH, json={"input": [[i] * 20 for i in range(5)]}))
            await until(lambda: world.engine.requests)
            while not asking.done():
                answer(world.engine)
                await asyncio.sleep(0)
            assert world.engine.most == MOST_PORTIONS
            world.interactive(*"abcdef")
            response = await client.post(PATH, json={"input": "a"})
            assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")

    play(scene())


def test_a_call_ends_with_its_client_its_time_or_an_error(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving(tmp_path) as (world, client):
            metrics = world.service.metrics
            response = await client.post(PATH, json={"input": [[1], [2]], "timeout": 0.05})
            assert (response.status_code, response.json()["error"]["code"]) == (408, "timeout")
            assert not world.engine.requests and not world.shared.journals()
            asking = asyncio.create_task(client.post(PATH, json={"input": [[i] for i in range(20)]}))
            await until(lambda: world.engine.requests)
            world.engine.answer(next(iter(world.engine.requests)), error="out of luck")
            assert (await asking).json()["error"]["code"] == "engine_error"
            assert not world.engine.requests and not world.shared.journals()
            asking = asyncio.create_task(client.post(PATH, json={"input": "a"}))
            await until(lambda: world.engine.requests)
            asking.cancel()
            await until(lambda: not world.shared.journals())
            (counted,) = [one for one in metrics.registry.collect() if one.name == "vllm:request_success"]
            assert {
                one.labels["finished_reason"] for one in counted.samples if one.value and one.name.endswith("_total")
            } == {"error", "abort"}

    play(scene())


def test_an_api_key_pays_for_each_input_and_token(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving(tmp_path, key_max_requests=3, key_tokens_per_minute=100) as (world, client):
            response = await ask(world, client, input=[[1]] * 4)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, "input")
            assert "4 inputs, but an API key may have at most 3 unfinished" in error["message"]
            response = await ask(world, client, input=[[1] * 20] * 2)
            assert (response.status_code, response.headers["x-ratelimit-remaining-tokens"]) == (200, "60")

    play(scene())


def test_lines_of_batches_give_way_with_all_that_they_submit(tmp_path: Path) -> None:
    rows = [
        {"custom_id": name, "method": "POST", "url": PATH, "body": body}
        for name, body in {"many": {"input": [[i] for i in range(30)]}, "wrong": {"input": []}}.items()
    ]

    async def scene() -> None:
        async with serving(tmp_path) as (world, client):
            upload = {"file": ("x", "\n".join(map(json.dumps, rows)).encode())}
            file = (await client.post("/v1/files", files=upload, data={"purpose": "batch"})).json()
            asked = {"input_file_id": file["id"], "endpoint": PATH, "completion_window": "1h"}
            batch = (await client.post("/v1/batches", json=asked)).json()
            await until(lambda: world.engine.requests)
            answer(world.engine)
            await until(lambda: world.engine.requests)  # a later portion, which another task submits
            assert not world.shared.journals() and world.shared.num_of_lines == len(world.engine.requests)
            world.interactive("a")
            assert list(world.engine.requests) == ["a"]
            world.engine.answer("a")
            while (state := await world.state(batch["id"])).status != "completed":
                answer(world.engine)
                await asyncio.sleep(0.001)
            (done,) = await world.rows(state.output_file_id)
            body = done["response"]["body"]
            assert [one["embedding"][0] for one in body["data"]] == list(range(30))
            (wrong,) = await world.rows(state.error_file_id)
            assert wrong["response"]["status_code"] == 400
            assert BatchBody(**asked).endpoint == PATH

    play(scene())


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (None, "last"),
        ({"word_embedding_dimension": 8, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "include_prompt": True}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"embedding_dimension": 8, "pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["cls", "max"]}, "cls+max"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean_tokens"),
    ],
)
def test_the_checkpoint_says_how_states_are_pooled(
    config: dict[str, Any] | None, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if config is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling/config.json").write_text(json.dumps(config))
    assert load_pooling(tmp_path) == method
    monkeypatch.setattr("shoal.server.setup.load_pooling", lambda _: method)

    async def scene() -> None:
        async with serving(tmp_path) as (world, client):
            asking = asyncio.create_task(client.post(PATH, json={"input": "a"}))
            await until(lambda: world.engine.requests or asking.done())
            if method in ("last", "mean", "cls"):
                (request,) = world.engine.requests.values()
                assert request.params.pooling == Pooling(method, 512)  # type: ignore[arg-type]
                answer(world.engine)
                assert (await asking).status_code == 200
            else:
                error = (await asking).json()["error"]
                assert error["message"] == (
                    f"the model pools embeddings by '{method}', but this server knows last, mean, cls only"
                )

    play(scene())


def test_a_malformed_file_about_pooling_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode": 3}')
    with pytest.raises(CheckpointError, match=r"1_Pooling/config\.json: pooling_mode: expected a name"):
        load_pooling(tmp_path)
