"""The records of steps go to those requests that want them, and to nobody else."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from shoal.scheduler.explanation import RequestHistory
from shoal.scheduler.output import SamplingParams, SchedulingParams
from shoal.scheduler.step_record import StepRecord
from shoal.server.engine.client import EngineClient
from shoal.server.engine.explaining import tell_histories
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.messages import Abort, Command, EngineRequest, News, Ready, Report, Submit
from shoal.server.engine.submission import Submission
from shoal.server.metrics import Metrics
from tests.fakes import Harness
from tests.scheduler.test_explanation import share, step


class Wire:
    """Hands over what is put into `commands`, and keeps what the loop sends, as it comes over a wire."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.news: list[News] = []

    def send(self, report: Report) -> None:
        self.news.append(msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=News))

    def receive(self, seconds: float | None) -> list[Command]:
        come, self.commands = self.commands, []
        return come


class Engine:
    """An engine's loop, turn by turn."""

    def __init__(self, **limits: int) -> None:
        self.harness = Harness(**limits)
        self.wire = Wire()
        self.loop = EngineLoop(self.harness.engine, self.wire)

    def turn(self, *commands: Command) -> StepRecord | None:
        """The record that came of a turn."""
        self.wire.commands += commands
        self.wire.news.clear()
        self.loop.turn()
        self.harness.now += 1.0
        return self.wire.news[-1].step if self.wire.news else None

    @property
    def is_observed(self) -> bool:
        return bool(self.harness.engine.observers)


def asked(request_id: str, *, timing: bool = True, max_tokens: int = 2, client: str = "") -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, seed=0)
    scheduling = SchedulingParams(client=client)
    return EngineRequest(request_id, [1, 2, 3], params, scheduling=scheduling, timing=timing)


def test_nothing_is_recorded_for_those_who_do_not_ask() -> None:
    engine = Engine()
    assert engine.turn(Submit([asked("a", timing=False)])) is None
    assert engine.turn() is None
    assert not engine.is_observed


def test_the_steps_of_those_who_ask_are_sent_and_then_no_more() -> None:
    engine = Engine()
    engine.turn(Submit([asked("long", timing=False, max_tokens=9)]))
    first = engine.turn(Submit([asked("a")]))
    assert first is not None
    assert {one.request_id for one in first.shares} == {"long", "a"}
    assert engine.turn() is not None
    assert not engine.is_observed, "its second token was its last"
    assert engine.turn() is None


def test_a_step_without_a_token_is_sent_too() -> None:
    engine = Engine(max_chunk_tokens=1)
    assert engine.turn(Submit([asked("a")])) is not None
    assert not engine.wire.news[-1].outputs


def test_steps_of_others_are_not_sent_while_one_waits_or_is_gone() -> None:
    engine = Engine(max_num_seqs=1)
    assert engine.turn(Submit([asked("long", timing=False, max_tokens=9), asked("a")])) is None
    assert engine.is_observed
    engine.turn(Abort(["a"]))
    assert not engine.is_observed


def test_other_observers_stay() -> None:
    engine, seen = Engine(), list[StepRecord]()
    engine.harness.engine.observers = [seen.append]
    engine.turn(Submit([asked("a", max_tokens=1)]))
    engine.turn(Submit([asked("b", timing=False, max_tokens=1)]))
    assert [[one.request_id for one in record.shares] for record in seen] == [["a"], ["b"]]
    assert engine.harness.engine.observers == [seen.append]


@pytest.mark.parametrize("names_all", [True, False])
def test_only_requests_of_the_same_client_are_named(names_all: bool) -> None:
    async def play() -> RequestHistory:
        requests = [asked("a", client="me"), asked("b", client="me"), asked("c", client="you", timing=False)]
        submission = Submission(requests, 0.0)
        unfinished = dict.fromkeys(submission.journals, submission)
        record = step(0.0, share("a"), share("b"), share("c"), share("gone"), joined={"a": 0.0, "b": 0.0})
        tell_histories(record, unfinished, names_all=names_all)
        assert submission.journals["c"].history is None
        history = submission.journals["a"].history
        assert history is not None
        return history

    found = asyncio.run(play()).explanation()
    assert found is not None
    assert found.num_companions == 3
    assert [one.request_id for one in found.companions] == (["b", "c", "gone"] if names_all else ["b"])


def test_a_history_outlives_its_engine() -> None:
    """The same client, and two engines whose clocks differ."""

    async def play() -> RequestHistory:
        client = EngineClient("0", Metrics("m"), clock=lambda: 100.0)
        for base in (50.0, 7000.0):
            engine = Engine()
            engine.harness.now = base
            sent: list[Submit | Abort] = []
            client.connect(Ready(engine.harness.config, 1, 1, "", None), sent.append)
            if base == 50.0:
                submission = client.submit([asked("a", max_tokens=4)])
            for _ in range(2):
                engine.turn(*sent)
                sent.clear()
                for news in engine.wire.news:
                    client.take(news)
            client.lose()
        history = submission.journals["a"].history
        assert history is not None
        return history

    found = asyncio.run(play()).explanation()
    assert found is not None
    assert found.num_output_tokens == 4
    assert found.num_prefill_chunks == 2
