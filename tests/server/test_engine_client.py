"""The API process's side of the engine, against a process that plays every part an engine can."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import tests.server.fake_engine as fake
from shoal.scheduler.errors import ConfigError, ContextLengthError, EngineError, QueueFullError, ShoalError
from shoal.scheduler.output import RequestOutput, SamplingParams
from shoal.server.engine.client import EngineClient, EngineState
from shoal.server.engine.journal import Submission
from shoal.server.engine.messages import EngineRequest
from shoal.server.engine.supervisor import EngineSupervisor
from shoal.server.errors import EngineUnavailableError
from shoal.server.metrics import Metrics
from shoal.server.settings import resolve

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Start the fake where the client starts the real one, and leave its sockets where they can be found."""
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT}:{ROOT}/src exec {sys.executable} -m tests.server.fake_engine "$@"\n',
        encoding="utf-8",
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))


def request(request_id: str, part: int, max_tokens: int = 8) -> EngineRequest:
    return EngineRequest(request_id, [part, 0, 0, 0], SamplingParams(max_tokens=max_tokens, seed=1))


@asynccontextmanager
async def engine(model: str = "plays", **settings: object) -> AsyncIterator[EngineClient]:
    client = EngineClient("0", Metrics("fake"))
    supervisor = EngineSupervisor(resolve({"model": model, "engine": settings}), client)
    try:
        await supervisor.start()
        yield client
    finally:
        await supervisor.stop()


async def news(submission: Submission, count: int) -> list[RequestOutput]:
    found: list[RequestOutput] = []
    while len(found) < count:
        found += await submission.get()
    return found


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(280):
        while not holds():  # noqa: ASYNC110 (what changes is a number in another's keeping)
            await asyncio.sleep(0.01)


def sample(client: EngineClient, name: str) -> float | None:
    return client._metrics.registry.get_sample_value(f"vllm:{name}", {"model_name": "fake", "engine": "0"})


def play_out(scene: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(280):
            await scene()

    asyncio.run(limited())


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("refuses", ConfigError, "num_blocks: too many"),
        ("dies", EngineError, "exit code 3"),
        ("babbles", EngineError, "the engine failed: .*"),
    ],
)
def test_an_engine_that_cannot_start(model: str, error: type[ShoalError], message: str, tmp_path: Path) -> None:
    async def scene() -> None:
        with pytest.raises(error, match=message) as caught:
            async with engine(model):
                pass
        assert caught.value.param == ("num_blocks" if model == "refuses" else None)

    play_out(scene)
    assert not list((tmp_path / "temp").iterdir())


def test_sockets_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The path of a socket is short on every system; a folder for temporary files need not be."""
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))

    async def scene() -> None:
        with pytest.raises(EngineError, match="is longer than"):
            async with engine():
                pass

    play_out(scene)
    assert not list(folder.iterdir())


def test_news_come_in_order_and_are_kept(tmp_path: Path) -> None:
    async def scene() -> None:
        async with engine() as client:
            assert client.state is EngineState.READY
            assert (client.ready.limits.num_blocks, client.ready.limits.max_model_len) == (64, 512)
            submission = client.submit([request("a", fake.ANSWER), request("b", fake.ANSWER)])
            assert client.num_unfinished == 2
            outputs = await news(submission, 6)
            for name in ("a", "b"):
                own = [output for output in outputs if output.request_id == name]
                assert [token_id for output in own for token_id in output.token_ids] == fake.TOKENS
                assert [output.finish_reason is not None for output in own] == [False, False, True]
                journal = submission.journals[name]
                assert journal.output_token_ids == fake.TOKENS
                assert (journal.num_cached_tokens, journal.queue_time) == (3, 0.25)
                assert journal.first_token_time is not None and journal.last_token_time is not None
                assert journal.arrival_time <= journal.first_token_time <= journal.last_token_time
            assert client.num_unfinished == 0

    play_out(scene)
    assert not list((tmp_path / "temp").iterdir())


def test_what_is_refused_never_reaches_the_engine() -> None:
    async def scene() -> None:
        async with engine() as client:
            with pytest.raises(ContextLengthError):
                client.submit([request("a", fake.DIE), request("b", fake.DIE, max_tokens=1000)])
            with pytest.raises(QueueFullError):
                client.submit([request(f"r{i}", fake.DIE) for i in range(4)])
            assert client.num_unfinished == 0
            await news(client.submit([request("c", fake.ANSWER)]), 3)

    play_out(scene)


def test_an_abort_reaches_the_engine_once() -> None:
    async def scene() -> None:
        async with engine() as client:
            client.submit([request("a", fake.SILENCE), request("b", fake.SILENCE)])
            client.abort(["a", "unknown"])
            client.abort(["a"])
            await until(lambda: sample(client, "num_requests_waiting") == 1)
            client.abort(["a", "b"])
            await until(lambda: sample(client, "num_requests_waiting") == 2)
            assert client.num_unfinished == 0

    play_out(scene)


def test_a_request_that_failed_on_its_own_leaves_the_others() -> None:
    async def scene() -> None:
        async with engine() as client:
            failing = client.submit([request("a", fake.FAIL)])
            other = client.submit([request("b", fake.ANSWER)])
            with pytest.raises(EngineError, match="out of luck"):
                await failing.get()
            await news(other, 3)

    play_out(scene)


@pytest.mark.parametrize("part", [fake.DIE, fake.DIE_AFTER_A_TOKEN, fake.GARBAGE])
def test_when_an_engine_fails_its_requests_end_and_a_new_one_comes(part: int, tmp_path: Path) -> None:
    async def scene() -> None:
        async with engine() as client:
            waiting = client.submit([request("a", fake.SILENCE)])
            fatal = client.submit([request("b", part)])
            if part == fake.DIE_AFTER_A_TOKEN:
                assert (await fatal.get())[0].token_ids == fake.TOKENS[:1]
            for submission in (fatal, waiting):
                with pytest.raises(EngineError, match="died"):
                    await submission.get()
            assert client.num_unfinished == 0
            assert sample(client, "num_requests_running") == 0 == sample(client, "kv_cache_usage_perc")
            with pytest.raises(EngineUnavailableError, match="starting"):
                client.submit([request("c", fake.ANSWER)])
            await until(lambda: client.state is EngineState.READY)
            await news(client.submit([request("d", fake.ANSWER)]), 3)
            # A new engine counts from zero, the server's counters go on.
            first = 1 if part == fake.DIE_AFTER_A_TOKEN else 0
            assert sample(client, "prefix_cache_queries_total") == 2 * (first + 1)
            assert len(list((tmp_path / "temp").iterdir())) == 1

    play_out(scene)


def test_a_drain_waits_and_then_ends_what_is_left() -> None:
    async def scene() -> None:
        async with engine() as client:
            await client.drain(100)  # nothing to wait for
        async with engine() as client:
            silent = client.submit([request("a", fake.SILENCE)])
            draining = asyncio.create_task(client.drain(0.1))
            await asyncio.sleep(0)
            with pytest.raises(EngineUnavailableError, match="shutting down"):
                client.submit([request("b", fake.ANSWER)])
            await draining
            with pytest.raises(EngineUnavailableError, match="shutting down"):
                await silent.get()
        async with engine() as client:
            silent = client.submit([request("a", fake.SILENCE)])
        with pytest.raises(EngineUnavailableError, match="shutting down"):
            await silent.get()
        with pytest.raises(EngineUnavailableError, match="shutting down"):
            client.submit([request("b", fake.ANSWER)])

    play_out(scene)


def test_a_stopped_engine_closes_what_it_writes(tmp_path: Path) -> None:
    async def scene() -> None:
        async with engine(trace=tmp_path / "trace.json") as client:
            client.submit([request("a", fake.SILENCE)])

    play_out(scene)
    assert (tmp_path / "trace.json").read_text() == "closed"
