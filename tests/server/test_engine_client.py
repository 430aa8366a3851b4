"""The API process's side of the engine, against a process that plays every part an engine can."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

import shoal.server.engine.supervisor as supervisor_module
import tests.server.fake_engine as fake
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import ConfigError, ContextLengthError, EngineError, QueueFullError, ShoalError
from shoal.scheduler.output import RequestOutput, SamplingParams, SchedulerStats
from shoal.server.engine.client import MAX_DEATHS, EngineClient, EngineState
from shoal.server.engine.messages import Abort, Command, EngineRequest, News, Ready, Submit
from shoal.server.engine.submission import Submission
from shoal.server.engine.supervisor import EngineSupervisor
from shoal.server.errors import EngineUnavailableError, RequestTimeoutError, SlowClientError
from shoal.server.metrics import Metrics
from shoal.server.settings import resolve

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Start the fake where the client starts the real one."""
    script = tmp_path / "python"
    script.write_text(
        f"#!/bin/sh\nPYTHONPATH={ROOT}:{ROOT}/src exec {sys.executable} -m tests.server.fake_engine {tmp_path}\n",
        encoding="utf-8",
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def request(request_id: str, part: int, max_tokens: int = 8, num_tokens: int = 4) -> EngineRequest:
    prompt = [part, *[1000] * (num_tokens - 1)]
    return EngineRequest(request_id, prompt, SamplingParams(max_tokens=max_tokens, seed=1))


@asynccontextmanager
async def engine(model: str = "plays", **settings: object) -> AsyncIterator[EngineClient]:
    resolved = resolve({"model": model, "engine": settings})
    client = EngineClient("0", Metrics("fake"), hang_seconds=resolved.engine.hang_seconds)
    supervisor = EngineSupervisor(resolved, client)
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


def sample(client: EngineClient, name: str, prefix: str = "vllm") -> float | None:
    return client._metrics.registry.get_sample_value(f"{prefix}:{name}", {"model_name": "fake", "engine": "0"})


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
def test_an_engine_that_cannot_start(model: str, error: type[ShoalError], message: str) -> None:
    async def scene() -> None:
        with pytest.raises(error, match=message) as caught:
            async with engine(model):
                pass
        assert caught.value.param == ("num_blocks" if model == "refuses" else None)

    play_out(scene)


def test_news_come_in_order_and_are_kept() -> None:
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
            await news(client.submit([request("c", fake.ANSWER)]), 3)  # then it has heard of the others, too
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


def test_requests_outlive_their_engine() -> None:
    async def scene() -> None:
        async with engine() as client:
            num_open = psutil.Process().num_fds()
            waiting = client.submit([request("a", fake.DIE_AFTER_A_TOKEN)])
            assert [output.token_ids for output in await news(waiting, 2)] == [fake.TOKENS[:1], fake.TOKENS[1:]]
            journal = waiting.journals["a"]
            assert (journal.output_token_ids, journal.num_deaths) == (fake.TOKENS, 0)
            assert client.num_unfinished == 0
            await news(client.submit([request("d", fake.ANSWER)]), 3)
            assert sample(client, "engine_restarts_total", "shoal") == 1
            assert sample(client, "requests_resumed_total", "shoal") == 1
            assert 0 < (sample(client, "engine_pause_seconds_total", "shoal") or 0) < 100
            # A new engine counts from zero, the server's counters go on.
            assert sample(client, "prefix_cache_queries_total") == 4
            assert psutil.Process().num_fds() == num_open

    play_out(scene)


@pytest.mark.parametrize("part", [fake.DIE, fake.GARBAGE])
def test_a_request_that_kills_engines_ends_and_all_others_live(part: int) -> None:
    async def scene() -> None:
        async with engine() as client:
            fatal, other = client.submit([request("a", part)]), client.submit([request("b", fake.ANSWER)])
            with pytest.raises(EngineError, match="died each of 4 times"):
                await fatal.get()
            assert len(await news(other, 3)) == 3
            await news(client.submit([request("c", fake.ANSWER)]), 3)
            assert client.num_unfinished == 0
            assert sample(client, "engine_restarts_total", "shoal") == 4

    play_out(scene)


def test_what_is_given_up_while_an_engine_hangs_never_reaches_it() -> None:
    async def scene() -> None:
        async with engine(hang_seconds=280) as client:
            (process,) = psutil.Process().children()
            process.suspend()
            for number in range(2000):
                client.submit([request(f"r{number}", fake.SILENCE, num_tokens=400)])
                await asyncio.sleep(0)  # long enough for the outbox to send it, if there is room
                client.abort([f"r{number}"])
            assert client.num_unfinished == 0
            waiting = client.submit([request("last", fake.ANSWER)])
            process.resume()
            assert len(await news(waiting, 3)) == 3
            assert 0 < (sample(client, "num_requests_waiting") or 0) < 1000, "so many aborts did the engine hear of"

    play_out(scene)


def test_what_cannot_be_sent_ends_like_what_kills_engines() -> None:
    async def scene() -> None:
        async with engine() as client:
            params = SamplingParams(max_tokens=8, seed=2**70)
            spoilt = client.submit([EngineRequest("a", [fake.ANSWER], params)])
            with pytest.raises(EngineError, match="died each of 4 times"):
                await spoilt.get()
            await news(client.submit([request("b", fake.ANSWER)]), 3)

    play_out(scene)


class Hand:
    """A client whose engine is played by hand."""

    def __init__(self) -> None:
        limits = SchedulerConfig(num_blocks=64, max_model_len=512, max_num_seqs=2, max_num_batched_tokens=16)
        self.ready = Ready(limits, 1, 2, "by hand", None)
        self.now = 0.0
        self.commands: list[Command] = []
        self.client = EngineClient("0", Metrics("fake"), hang_seconds=5, clock=lambda: self.now)
        self.connect()

    def connect(self) -> None:
        self.client.connect(self.ready, self.commands.append)

    def submit(self, name: str) -> Submission:
        return self.client.submit([request(name, fake.ANSWER)])

    def say(self, *names: str) -> None:
        """The engine has a token for each of these requests."""
        self.client.take(News([RequestOutput(name, [7]) for name in names], SchedulerStats(0, 0, 0.0, 0, 0, 0)))

    def heard(self) -> list[Submit | Abort]:
        """The commands since the last call, all of them of requests."""
        commands, self.commands[:] = list(self.commands), []
        return [command for command in commands if isinstance(command, Submit | Abort)]

    def restart(self) -> list[list[str]]:
        """Another engine; returns what it is asked, by ids."""
        self.client.lose()
        self.heard()
        self.connect()
        return self.asked()

    def asked(self) -> list[list[str]]:
        return [
            [one.request_id for one in command.requests]
            if isinstance(command, Submit)
            else ["abort", *command.request_ids]
            for command in self.heard()
        ]


def test_a_request_goes_on_with_its_tokens_and_its_age() -> None:
    async def scene() -> None:
        hand = Hand()
        hand.submit("a")
        hand.now = 2.0
        hand.say("a")
        hand.client.lose()
        hand.submit("b")
        hand.say("a")  # what a dead engine said is not taken twice
        hand.now = 3.0
        hand.heard()
        hand.connect()
        (command,) = hand.heard()
        assert isinstance(command, Submit)
        assert [(one.request_id, one.output_token_ids, one.age) for one in command.requests] == [
            ("a", [7], 3.0),
            ("b", [], 1.0),
        ]

    play_out(scene)


def test_suspects_are_tried_one_by_one_and_the_guilty_one_ends() -> None:
    async def scene() -> None:
        hand = Hand()
        submissions = {name: hand.submit(name) for name in "abcd"}
        assert hand.restart() == hand.restart() == [["a", "b", "c", "d"]]
        hand.say("d")  # gets on, and is above suspicion
        assert hand.restart() == [["a"]]
        hand.say("a")
        assert hand.asked() == [["abort", "a"], ["b"]]
        hand.say("a")  # said before it was told of the abort
        assert submissions["a"].journals["a"].output_token_ids == [7]
        hand.submit("e")
        assert hand.asked() == []
        assert hand.restart() == [["c"]]
        with pytest.raises(EngineError, match="died each of 4 times"):
            await submissions["b"].get()
        hand.say("c")
        assert hand.asked() == [["a", "d", "e"]]
        assert hand.client.num_unfinished == 4

    play_out(scene)


def test_a_suspect_whose_client_leaves_ends_its_trial() -> None:
    async def scene() -> None:
        hand = Hand()
        hand.submit("a")
        hand.submit("b")
        for _ in range(2):
            hand.restart()
        assert hand.restart() == [["a"]]
        hand.client.abort(["a"])
        assert hand.asked() == [["abort", "a"], ["b"]]
        hand.client.abort(["b"])
        assert hand.asked() == [["abort", "b"]]
        assert hand.client.num_unfinished == 0

    play_out(scene)


def test_one_that_was_tried_comes_back_when_the_engine_says_no_more_of_it() -> None:
    """Though the one that is tried after it is aborted, so that nothing is heard of that one."""

    async def scene() -> None:
        hand = Hand()
        submissions = {name: hand.submit(name) for name in "ab"}
        for _ in range(2):
            hand.restart()
        assert hand.restart() == [["a"]]
        hand.say("a")
        assert hand.asked() == [["abort", "a"], ["b"]]
        hand.client.abort(["b"])
        assert hand.asked() == [["abort", "b"]]
        hand.client.take(News([RequestOutput("a", [8])], SchedulerStats(1, 0, 0.1, 0, 0, 0)))
        assert hand.asked() == []
        hand.client.take(News([], SchedulerStats(0, 0, 0.0, 0, 0, 0)))
        assert hand.asked() == [["a"]]
        assert submissions["a"].journals["a"].output_token_ids == [7]

    play_out(scene)


def test_an_engine_that_does_not_say_that_a_trial_is_over_hangs() -> None:
    """It has no work, but one that was tried waits for it."""

    async def scene() -> None:
        hand = Hand()
        for name in "ab":
            hand.submit(name)
        for _ in range(MAX_DEATHS):
            hand.restart()
        hand.say("a")
        hand.client.abort(["b"])
        hand.now = 5.5
        assert hand.client.hangs
        assert hand.restart() == [["a"]]
        assert not hand.client.hangs

    play_out(scene)


def test_a_client_that_does_not_read_gets_an_error_after_all_that_was_kept() -> None:
    async def scene() -> None:
        hand = Hand()
        submission = hand.submit("a")
        news = News([RequestOutput("a", [7] * 1000)], SchedulerStats(0, 0, 0.0, 0, 0, 0))
        for _ in range(70):
            hand.client.take(news)
        taken = []
        with pytest.raises(SlowClientError, match="the client does not read: 66000 tokens"):
            while True:
                taken.append(await submission.get())
        assert [len(portion) for portion in taken] == [2] * 32 + [1], "in portions"

    play_out(scene)


def test_only_an_engine_with_work_can_hang() -> None:
    async def scene() -> None:
        hand = Hand()
        hand.now = 100.0
        hand.client.check_health()
        hand.submit("a")
        hand.now = 104.0
        hand.say("a")
        hand.now = 109.0
        assert not hand.client.hangs
        hand.now = 109.5
        assert hand.client.hangs
        with pytest.raises(EngineUnavailableError, match="being replaced"):
            hand.client.check_health()
        hand.client.lose()
        assert not hand.client.hangs
        with pytest.raises(EngineUnavailableError, match="being replaced"):
            hand.client.check_health()

    play_out(scene)


def test_an_engine_that_hangs_is_replaced() -> None:
    async def scene() -> None:
        async with engine(hang_seconds=0.5) as client:
            client.check_health()
            hung = client.submit([request("a", fake.HANG_AFTER_A_TOKEN)])
            assert [output.token_ids for output in await news(hung, 2)] == [fake.TOKENS[:1], fake.TOKENS[1:]]
            client.check_health()

    play_out(scene)


def test_an_engine_that_stands_by_takes_over() -> None:
    async def scene() -> None:
        async with engine(standby=True) as client:
            for name in "abc":
                await news(client.submit([request(name, fake.DIE_AFTER_A_TOKEN)]), 2)
            assert sample(client, "engine_restarts_total", "shoal") == 3

    play_out(scene)


def test_what_waits_ends_if_no_engine_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "START_DELAYS", (0.0,))

    async def scene() -> None:
        async with engine("dies later") as client:
            with pytest.raises(EngineError, match="no engine could be started: the engine died with exit code 3"):
                await client.submit([request("a", fake.DIE)]).get()
            with pytest.raises(EngineUnavailableError, match="starting"):
                client.submit([request("b", fake.ANSWER)])

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


def test_a_request_whose_time_has_run_out_is_dropped_at_once() -> None:
    async def scene() -> None:
        hand = Hand()
        late = hand.client.submit([request("a", fake.ANSWER), request("b", fake.ANSWER)], 0.01)
        hand.say("a")
        assert hand.asked() == [["a", "b"]]
        with pytest.raises(RequestTimeoutError, match=r"in its timeout of 0\.01 s"):
            while True:
                await late.get()
        assert hand.asked() == [["abort", "a", "b"]]
        assert hand.client.num_unfinished == 0

    play_out(scene)


def test_a_deadline_outlives_the_engine() -> None:
    async def scene() -> None:
        hand = Hand()
        late = hand.client.submit([request("a", fake.ANSWER)], 0.05)
        assert hand.restart() == [["a"]]
        hand.client.lose()
        with pytest.raises(RequestTimeoutError):
            await late.get()
        assert hand.restart() == []

    play_out(scene)
