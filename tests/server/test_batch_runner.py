"""Batches over an engine that plays a script, beside requests of others."""

from __future__ import annotations

import asyncio
import io
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import shoal.server.batches.runner as runner_module
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import QueueFullError
from shoal.scheduler.output import FinishReason, RequestOutput, SamplingParams, SchedulerStats
from shoal.server.app import create_app
from shoal.server.batches.runner import BatchRunner
from shoal.server.batches.store import Batches
from shoal.server.engine.client import EngineClient
from shoal.server.engine.messages import Abort, Command, EngineRequest, News, Ready, Submit
from shoal.server.keys import owner_name
from shoal.server.service import Service
from shoal.server.settings import resolve
from shoal.server.setup import build_service
from shoal.server.wire.batches import Batch, BatchBody
from tests.fakes import digest

URL = "/v1/completions"
ENDS = ("completed", "cancelled", "expired", "failed")
LIMITS = SchedulerConfig(num_blocks=64, max_model_len=256, max_num_seqs=4, max_num_batched_tokens=16, max_num_waiting=2)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "POLL_SECONDS", 0.001)


class ScriptedEngine:
    """An engine of which a test says when it answers; what it answers depends on the request alone.

    Attributes:
        requests: the unfinished ones.
        most: that were ever there at once.
        orders: how often each prompt was submitted.
    """

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.requests: dict[str, EngineRequest] = {}
        self.most = 0
        self.orders: Counter[tuple[int, ...]] = Counter()
        self.num_waiting = 0
        client.connect(Ready(LIMITS, 1, 2, "a fake", None), self.send)

    def send(self, command: Command) -> None:
        match command:
            case Submit(requests):
                self.requests |= {request.request_id: request for request in requests}
                self.orders.update(tuple(request.prompt_token_ids) for request in requests)
                self.most = max(self.most, len(self.requests))
            case Abort(request_ids):
                for request_id in request_ids:
                    self.requests.pop(request_id, None)

    def answer(self, request_id: str, error: str | None = None) -> None:
        request = self.requests.pop(request_id)
        seed = digest(request.prompt_token_ids, request.params.seed)
        tokens = [40 + (seed >> i) % 60 for i in range(request.params.max_tokens)]
        reason = FinishReason.ERROR if error else FinishReason.LENGTH
        self.news(RequestOutput(request_id, [] if error else tokens, reason, error=error))

    def news(self, *outputs: RequestOutput) -> None:
        self.client.take(News([*outputs], SchedulerStats(len(self.requests), self.num_waiting, 0.0, 0, 0, 0)))


class World:
    """A server without its processes: service, scripted engine, and a runner that may be started anew."""

    def __init__(self, folder: Path, **server: Any) -> None:
        self.folder = folder
        self.settings = resolve({"server": server | {"data_folder": str(folder)}})
        self.now = 1000.0

    async def start(self) -> None:
        service, client = build_service(self.settings)
        self.engine = ScriptedEngine(client)
        self.shared = service.engine
        self.batches = Batches(self.folder, lambda: self.now)
        self.service: Service = replace(service, batches=self.batches)
        self.runner = BatchRunner(self.service)
        self.runner.start()

    async def stop(self) -> None:
        await self.runner.stop()
        await self.batches.close()
        await self.service.templates.close()

    async def batch(self, bodies: dict[str, dict[str, Any]], *, owner: str = "", **options: Any) -> str:
        """Upload and create a batch; returns its id."""
        rows = [{"custom_id": name, "method": "POST", "url": URL, "body": body} for name, body in bodies.items()]
        data = io.BytesIO("\n".join(map(json.dumps, rows)).encode())
        file = await self.batches.ask(lambda store: store.add_file(owner, "x", data))
        fields: dict[str, Any] = {"endpoint": URL, "completion_window": "24h"} | options
        model = fields.pop("model", self.service.model_name)
        body = BatchBody(input_file_id=file.id, **fields)
        batch = await self.batches.ask(lambda store: store.add_batch(owner, body, model))
        self.batches.changed.set()
        return batch.id

    async def state(self, batch_id: str, owner: str = "") -> Batch:
        return await self.batches.ask(lambda store: store.batch(owner, batch_id))

    async def rows(self, file_id: str | None) -> list[dict[str, Any]]:
        """The lines of a file, parsed."""
        if file_id is None:
            return []
        data = await self.batches.ask(lambda store: b"".join(store._all_pieces(file_id)))
        return [json.loads(row) for row in data.splitlines()]

    async def ended(self, batch_id: str, owner: str = "") -> Batch:
        """Answer whatever comes until the batch has ended; each of its lines is in one of its files, once."""
        while (batch := await self.state(batch_id, owner)).status not in ENDS:
            for request_id in list(self.engine.requests):
                self.engine.answer(request_id)
            await asyncio.sleep(0.001)
        rows = [*await self.rows(batch.output_file_id), *await self.rows(batch.error_file_id)]
        assert len({row["custom_id"] for row in rows}) == len(rows) == batch.request_counts.total
        return batch

    def interactive(self, *names: str, num_prompt_tokens: int = 1) -> None:
        """Submit requests as a client's call does."""
        params = SamplingParams(max_tokens=4, seed=0)
        self.shared.submit([EngineRequest(name, [7] * num_prompt_tokens, params) for name in names])

    @property
    def line_ids(self) -> list[str]:
        """Requests of lines that the engine has."""
        return [request_id for request_id in self.engine.requests if request_id.startswith("cmpl")]


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(200):
        while not holds():  # noqa: ASYNC110 (what changes is in another's keeping)
            await asyncio.sleep(0.001)


@asynccontextmanager
async def running(folder: Path, **server: Any) -> AsyncIterator[World]:
    world = World(folder, **server)
    await world.start()
    yield world
    await world.stop()


def bodies(count: int, **options: Any) -> dict[str, dict[str, Any]]:
    return {f"line {i}": {"prompt": f"prompt {i}", "max_tokens": 3} | options for i in range(count)}


def _shown(answer: Any) -> Any:
    """An answer without what differs each time."""
    if isinstance(answer, dict):
        changing = ("id", "created", "created_at", "completed_at")
        return {name: _shown(value) for name, value in answer.items() if name not in changing}
    return [_shown(one) for one in answer] if isinstance(answer, list) else answer


def play(scene: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(250):
            await scene

    asyncio.run(limited())


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_a_line_is_answered_as_the_endpoint_answers(tmp_path: Path, endpoint: str) -> None:
    messages = [{"role": "user", "content": "Say something."}]
    base: dict[str, Any] = {
        "/v1/completions": {"prompt": ["one", "two"], "echo": True, "n": 2},
        "/v1/chat/completions": {"messages": messages, "n": 2},
        "/v1/responses": {"input": "Say something."},
    }[endpoint]
    most = "max_output_tokens" if endpoint == "/v1/responses" else "max_tokens"
    asked = {
        "plain": base | {most: 5},
        "seeded": base | {most: 5, "seed": 11, "stop": ["q"]},
        "wrong": base | {"temperature": 3},
        "long": base | {most: 5000},
        "other model": base | {"model": "other"},
    }

    async def scene() -> None:
        async with running(tmp_path) as world:
            rows = [
                {"custom_id": name, "method": "POST", "url": endpoint, "body": body} for name, body in asked.items()
            ]
            data = io.BytesIO("\n".join(map(json.dumps, rows)).encode())
            file = await world.batches.ask(lambda store: store.add_file("", "x", data))
            body = BatchBody(input_file_id=file.id, endpoint=endpoint, completion_window="1h")  # type: ignore[arg-type]
            batch = await world.batches.ask(lambda store: store.add_batch("", body, world.service.model_name))
            world.batches.changed.set()
            batch = await world.ended(batch.id)
            assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 2, 3)
            answers = {row["custom_id"]: row for row in await world.rows(batch.output_file_id)}
            errors = {row["custom_id"]: row for row in await world.rows(batch.error_file_id)}
            assert (answers.keys(), errors.keys()) == ({"plain", "seeded"}, {"wrong", "long", "other model"})

            transport = httpx.ASGITransport(create_app(world.service))
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                for name, row in (answers | errors).items():
                    response = row["response"]
                    seed = {"seed": response["body"]["seed"]} if name in answers else {}
                    asking = asyncio.create_task(client.post(endpoint, json=asked[name] | seed))
                    while not asking.done():
                        for request_id in list(world.engine.requests):
                            world.engine.answer(request_id)
                        await asyncio.sleep(0.001)
                    expected = asking.result()
                    assert (row["error"], response["status_code"]) == (None, expected.status_code)
                    assert _shown(response["body"]) == _shown(expected.json())
                    if name in answers:
                        assert response["request_id"] == response["body"]["id"]

    play(scene())


def test_lines_take_idle_rows_and_give_way(tmp_path: Path) -> None:
    async def scene() -> None:
        async with running(tmp_path) as world:
            world.interactive("a")
            batch_id = await world.batch(bodies(10))
            await until(lambda: len(world.line_ids) == 3)
            first = dict.fromkeys(world.line_ids)
            world.interactive("b", "c")  # the youngest lines are gone before the request is there
            assert world.line_ids == list(first)[:1] and world.engine.most == 4
            world.interactive("d", "e", "f")
            assert not world.line_ids and len(world.shared.journals()) == 6
            with pytest.raises(QueueFullError):
                world.interactive("g")
            for name in "abcdef":
                world.engine.answer(name)
            batch = await world.ended(batch_id)
            assert (batch.status, batch.request_counts.completed) == ("completed", 10)
            prompts = Counter({prompt: n for prompt, n in world.engine.orders.items() if prompt != (7,)})
            assert sum(prompts.values()) == 13 and len(prompts) == 10

    play(scene())


def test_lines_give_way_to_what_waits_in_the_engine(tmp_path: Path) -> None:
    """Where blocks are what is missing, or a share of the step, there are rows enough."""

    async def scene() -> None:
        async with running(tmp_path) as world:
            batch_id = await world.batch(bodies(6))
            await until(lambda: len(world.line_ids) == 4)
            world.interactive("a")
            world.engine.num_waiting = 1
            world.engine.news()
            await until(lambda: not world.line_ids)
            world.engine.num_waiting = 0
            world.engine.answer("a")
            assert (await world.ended(batch_id)).request_counts.completed == 6

    play(scene())


def test_lines_give_way_to_what_another_bound_would_refuse(tmp_path: Path) -> None:
    async def scene() -> None:
        async with running(tmp_path, max_queue_tokens=12) as world:
            batch_id = await world.batch(bodies(2))
            await until(lambda: len(world.line_ids) == 2)
            world.interactive("a", num_prompt_tokens=11)  # the prompts of the lines wait to be read
            assert len(world.line_ids) == 0
            with pytest.raises(QueueFullError):
                world.interactive("b", num_prompt_tokens=11)
            assert (await world.ended(batch_id)).request_counts.completed == 2

    play(scene())


def test_lines_are_not_among_what_a_key_may_ask(tmp_path: Path) -> None:
    limits = {"key_max_requests": 1, "key_requests_per_minute": 1, "key_tokens_per_minute": 40}
    owner = owner_name("my-key")

    async def scene() -> None:
        async with running(tmp_path, api_keys=["my-key"], **limits) as world:
            batch_id = await world.batch(bodies(6), owner=owner)
            await until(lambda: len(world.line_ids) == 4)
            world.service.allowances["my-key"].check(1, 40)
            assert (await world.ended(batch_id, owner)).request_counts.completed == 6
            world.service.allowances["my-key"].check(1, 40)

    play(scene())


def test_a_line_that_needs_the_whole_server_is_run_alone(tmp_path: Path) -> None:
    async def scene() -> None:
        async with running(tmp_path) as world:
            large = {"prompt": ["x"] * 6, "max_tokens": 2}
            batch_id = await world.batch({"small": {"prompt": "s"}, "large": large} | bodies(4))
            await until(lambda: len(world.line_ids) == 3)  # all but the large one, behind which nothing starts
            assert (await world.ended(batch_id)).request_counts.completed == 6
            assert world.engine.most == 6

    play(scene())


def test_a_batch_that_is_cancelled(tmp_path: Path) -> None:
    async def scene() -> None:
        async with running(tmp_path) as world:
            batch_id = await world.batch(bodies(9))
            await until(lambda: len(world.line_ids) == 4)
            world.engine.answer(world.line_ids[0])
            await until(lambda: world.engine.orders.total() == 5)
            batch = await world.batches.ask(lambda store: store.cancel("", batch_id))
            world.batches.changed.set()
            assert batch.status == "cancelling"
            await until(lambda: not world.engine.requests)
            batch = await world.ended(batch_id)
            assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("cancelled", 1, 8)
            assert {row["error"]["code"] for row in await world.rows(batch.error_file_id)} == {"batch_cancelled"}
            assert world.shared.num_of_lines == len(world.shared.journals()) == 0

    play(scene())


def test_a_batch_that_expires(tmp_path: Path) -> None:
    async def scene() -> None:
        async with running(tmp_path) as world:
            batch_id = await world.batch(bodies(9), completion_window="2h")
            await until(lambda: len(world.line_ids) == 4)
            world.now += 7199
            world.engine.answer(world.line_ids[0])
            await until(lambda: world.engine.orders.total() == 5)
            world.now += 1
            await until(lambda: not world.engine.requests)
            batch = await world.ended(batch_id)
            assert (batch.status, batch.expired_at, batch.expires_at) == ("expired", 8200, 8200)
            assert {row["error"]["code"] for row in await world.rows(batch.error_file_id)} == {"batch_expired"}
            assert [row["custom_id"] for row in await world.rows(batch.output_file_id)] == ["line 0"]

    play(scene())


def test_an_error_of_the_engine_is_one_lines(tmp_path: Path) -> None:
    async def scene() -> None:
        async with running(tmp_path) as world:
            batch_id = await world.batch(bodies(3))
            await until(lambda: len(world.line_ids) == 3)
            world.engine.answer(world.line_ids[1], error="out of luck")
            batch = await world.ended(batch_id)
            (row,) = await world.rows(batch.error_file_id)
            assert (row["custom_id"], row["error"], row["response"]["status_code"]) == ("line 1", None, 500)
            assert row["response"]["body"]["error"]["code"] == "engine_error"

    play(scene())


def test_no_line_is_started_without_an_engine(tmp_path: Path) -> None:
    async def scene() -> None:
        async with running(tmp_path) as world:
            world.engine.client.lose()
            batch_id = await world.batch(bodies(3))
            while (await world.state(batch_id)).status != "in_progress":  # noqa: ASYNC110
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)
            assert world.shared.num_of_lines == 0
            world.engine = ScriptedEngine(world.engine.client)
            assert (await world.ended(batch_id)).request_counts.completed == 3

    play(scene())


def test_batches_of_others_wait_for_their_server(tmp_path: Path) -> None:
    mine, theirs = owner_name("my-key"), owner_name("their-key")

    async def scene() -> None:
        async with running(tmp_path, api_keys=["my-key"]) as world:
            waiting = [
                await world.batch(bodies(2), owner=mine, model="other"),
                await world.batch(bodies(2), owner=theirs),
            ]
            batch_id = await world.batch(bodies(2), owner=mine)
            assert (await world.ended(batch_id, mine)).request_counts.completed == 2
            assert all(request.scheduling.client for request in world.engine.requests.values())
            for other, owner in zip(waiting, (mine, theirs), strict=True):
                batch = await world.state(other, owner)
                assert (batch.status, batch.request_counts.total, batch.request_counts.completed) == (
                    "in_progress",
                    2,
                    0,
                )
        async with running(tmp_path, api_keys=["their-key"]) as world:
            assert (await world.ended(waiting[1], theirs)).request_counts.completed == 2

    play(scene())


@pytest.mark.parametrize("number", [*range(4), *(pytest.param(n, marks=pytest.mark.long) for n in range(4, 12))])
def test_whatever_happens_each_line_is_answered_once(tmp_path: Path, number: int) -> None:
    """Requests of others come and go, lines give way, and the server starts anew, at any time."""
    chance = random.Random(number)
    asked = bodies(25)

    async def scene() -> None:
        world = World(tmp_path)
        await world.start()
        batch_id, names = await world.batch(asked), 0
        for _ in range(120):
            await asyncio.sleep(0.002 * chance.random())
            engine = world.engine
            match chance.choice(["answer", "answer", "answer", "come", "wait", "restart"]):
                case "answer" if engine.requests:
                    engine.answer(chance.choice(list(engine.requests)))
                case "come" if len(world.shared.journals()) < 6:
                    names += 1
                    world.interactive(f"other {names}")
                case "wait":
                    engine.num_waiting = chance.randrange(2)
                    engine.news()
                case "restart" if chance.random() < 0.2:
                    await world.stop()
                    await world.start()
            assert len(world.shared.journals()) <= 6
        world.engine.num_waiting = 0
        world.engine.news()
        batch = await world.ended(batch_id)
        assert (batch.status, batch.request_counts.completed) == ("completed", 25)
        for row in await world.rows(batch.output_file_id):
            body, prompt = row["response"]["body"], asked[row["custom_id"]]["prompt"]
            seed = digest(world.service.tokenizer.encode(prompt), body["seed"])
            tokens = [40 + (seed >> i) % 60 for i in range(3)]
            assert body["choices"][0]["text"] == world.service.tokenizer.decode(tokens)
        await world.stop()

    play(scene())
