"""The engine's loop: how long it waits, and that what crossed to it reaches the scheduler.  With a fake wire and a
virtual clock: waiting moves the clock on."""

from __future__ import annotations

import socket
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.scheduler.output import SamplingParams, SchedulingParams
from shoal.scheduler.policies import POLICIES
from shoal.scheduler.policies.static import Static
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.messages import (
    HEARTBEAT_SECONDS,
    Abort,
    Command,
    EngineRequest,
    News,
    Report,
    Stop,
    Submit,
)
from shoal.server.engine.packing import encode_hook, pack
from shoal.server.engine.sockets import LENGTH_BYTES, EngineSocket, Frames, _decoder, frame
from shoal.server.engine.submission import Submission
from shoal.server.metrics import NO_STATS
from tests.fakes import Harness

TIMEOUT = 2.5


class FakeWire:
    """Plays commands, each at its time.

    Attributes:
        waits: how long the loop was ready to wait, in each turn.
        reports: what it sent, with the time.
    """

    def __init__(self, harness: Harness, commands: list[tuple[float, Command]]) -> None:
        self.harness = harness
        self.to_come = commands
        self.waits: list[float | None] = []
        self.sent: list[tuple[float, Report]] = []

    def send(self, report: Report) -> None:
        self.sent.append((self.harness.now, report))

    def receive(self, seconds: float | None) -> list[Command]:
        self.waits.append(seconds)
        until = float("inf") if seconds is None else self.harness.now + seconds
        if self.to_come and self.to_come[0][0] <= until:
            until = max(self.harness.now, self.to_come[0][0])
        assert until < float("inf"), "the loop would wait for ever"
        self.harness.now = until
        come = [command for time, command in self.to_come if time <= until]
        self.to_come = self.to_come[len(come) :]
        return come


def submit(request_id: str, max_tokens: int = 1, *, age: float = 0.0) -> Submit:
    scheduling = SchedulingParams(client="me", priority=3, ttft_slo_ms=5.0)
    params = SamplingParams(max_tokens=max_tokens, seed=0)
    return Submit([EngineRequest(request_id, [1, 2], params, age, scheduling=scheduling)])


def run(commands: list[tuple[float, Command]], stop: Callable[[FakeWire], bool]) -> FakeWire:
    harness = Harness(policy="static", knobs=Static.Knobs(static_timeout_seconds=TIMEOUT), max_num_seqs=2)
    sockets = FakeWire(harness, commands)
    loop = EngineLoop(harness.engine, sockets)
    while not stop(sockets):
        loop.turn()
    return sockets


def ends(sockets: FakeWire) -> dict[str, float]:
    """When each request's last news was sent."""
    return {
        output.request_id: time
        for time, report in sockets.sent
        if isinstance(report, News)
        for output in report.outputs
        if output.finish_reason
    }


def test_the_loop_wakes_for_the_timeout_of_a_static_batch() -> None:
    sockets = run([(10.0, submit("a"))], lambda sockets: "a" in ends(sockets))
    assert ends(sockets) == {"a": 10.0 + TIMEOUT}
    first, *waits = sockets.waits
    assert first is None, "for the first command as long as it takes, and then no longer than needed"
    assert waits == [HEARTBEAT_SECONDS] * 10
    assert [time for time, _ in sockets.sent] == [10.0 + HEARTBEAT_SECONDS * number for number in range(11)]


def test_a_request_that_comes_meanwhile_fills_the_batch() -> None:
    sockets = run([(10.0, submit("a")), (11.0, submit("b"))], lambda sockets: len(ends(sockets)) == 2)
    assert ends(sockets) == {"a": 11.0, "b": 11.0}
    assert None not in sockets.waits[1:]


def test_the_loop_does_not_wait_while_requests_run() -> None:
    sockets = run([(0.0, submit("a", 3)), (0.0, submit("b", 3))], lambda sockets: len(ends(sockets)) == 2)
    assert sockets.waits == [None, 0.0, 0.0]


def test_after_an_abort_there_is_nothing_to_wake_for() -> None:
    sockets = run([(1.0, submit("a")), (2.0, Abort(["a"])), (90.0, submit("b"))], lambda s: "b" in ends(s))
    assert [number for number, wait in enumerate(sockets.waits) if wait is None] == [0, 5]


def test_an_abort_is_answered_though_nothing_has_changed() -> None:
    """The client may wait to hear that nothing is left."""
    commands = [(1.0, submit("a")), (1.0, Abort(["a"])), (1.1, submit("b")), (1.1, Abort(["b"]))]
    sockets = run(commands, lambda sockets: sockets.harness.now >= 1.1)
    assert [time for time, _ in sockets.sent] == [1.0, 1.1]


@pytest.mark.parametrize("is_bounded", [True, False])
def test_what_was_accepted_before_is_taken_however_many_there_are(is_bounded: bool) -> None:
    harness = Harness(max_num_seqs=1, max_num_waiting=1)
    requests = [EngineRequest(name, [1], SamplingParams(max_tokens=1, seed=0)) for name in "abc"]
    requests[-1] = replace(requests[-1], is_bounded=is_bounded)
    wire = FakeWire(harness, [(0.0, Submit(requests))])
    EngineLoop(harness.engine, wire).turn()
    refused = [output.request_id for _, news in wire.sent for output in news.outputs if output.error]  # type: ignore[union-attr]
    assert refused == ["c"] * is_bounded


def test_a_request_arrived_before_it_was_sent() -> None:
    """Its age crosses, and no reading of the sender's clock."""
    harness = Harness(policy="static", knobs=Static.Knobs(static_timeout_seconds=TIMEOUT), max_num_seqs=2)
    EngineLoop(harness.engine, FakeWire(harness, [(10.0, submit("a", age=1.0))])).turn()
    assert harness.scheduler.waiting["a"].arrival_time == 9.0


def test_a_stop_ends_the_loop() -> None:
    harness = Harness(policy="static", knobs=Static.Knobs(static_timeout_seconds=TIMEOUT), max_num_seqs=2)
    EngineLoop(harness.engine, FakeWire(harness, [(0.0, submit("a")), (1.0, Stop())])).run()
    assert "a" in harness.scheduler.waiting


def test_what_the_policy_may_know_reaches_the_scheduler() -> None:
    harness = Harness(policy="static", knobs=Static.Knobs(static_timeout_seconds=TIMEOUT), max_num_seqs=2)
    EngineLoop(harness.engine, FakeWire(harness, [(0.0, submit("a"))])).turn()
    assert harness.scheduler.waiting["a"].scheduling == SchedulingParams(client="me", priority=3, ttft_slo_ms=5.0)


@pytest.mark.parametrize("seconds", [0.0, 0.002])
def test_the_socket_gives_up_waiting(seconds: float) -> None:
    near, far = socket.socketpair()
    with near, far:
        wire = EngineSocket(near)
        assert wire.receive(seconds) == []
        for request_id in "ab":
            far.sendall(frame(Abort([request_id])))
        assert wire.receive(None) == [Abort(["a"]), Abort(["b"])]
        far.close()
        with pytest.raises(EOFError):
            wire.receive(seconds)
        with pytest.raises(ConnectionError):
            wire.send(News([], NO_STATS))


@given(st.lists(st.binary(max_size=300), max_size=9), st.randoms(use_true_random=False))
def test_messages_come_whole_however_they_are_cut(messages: list[bytes], random: Random) -> None:
    sent = b"".join(len(message).to_bytes(LENGTH_BYTES, "little") + message for message in messages)
    cuts = sorted(random.randint(0, len(sent)) for _ in range(random.randint(0, 12)))
    frames = Frames()
    came = [message for begin, end in pairwise([0, *cuts, len(sent)]) for message in frames.take(sent[begin:end])]
    assert came == messages


def encoded(request_id: str, prompt: list[int]) -> bytes:
    request = EngineRequest(request_id, pack(prompt), SamplingParams(max_tokens=1, seed=0))
    return msgspec.msgpack.encode(Submit([request]), enc_hook=encode_hook)


def test_a_token_of_a_prompt_crosses_in_four_bytes() -> None:
    prompt = list(range(0, 200_000, 200))
    message = encoded("a", prompt)
    assert len(message) < 4 * len(prompt) + 1000
    command = _decoder.decode(message)
    assert isinstance(command, Submit)
    assert list(command.requests[0].prompt_token_ids) == prompt


@pytest.mark.parametrize("policy", POLICIES)
def test_a_waiting_request_of_512_tokens_takes_less_than_6_kilobytes_in_each_process(policy: str) -> None:
    count = 100
    harness = Harness(policy=policy, num_blocks=1000, max_model_len=1024)
    loop = EngineLoop(harness.engine, FakeWire(harness, []))
    messages = [encoded(f"{index}", list(range(index * 1000, index * 1000 + 512))) for index in range(count)]
    tracemalloc.start()
    for message in messages:
        command = _decoder.decode(message)
        assert isinstance(command, Submit)
        assert loop._add(command.requests[0]) is None
    engine = tracemalloc.get_traced_memory()[0]
    del command
    submissions = []
    for index in range(count):
        prompt = pack(range(index * 1000, index * 1000 + 512))
        request = EngineRequest(f"{index}", prompt, SamplingParams(max_tokens=1, seed=0))
        submissions.append(Submission([request], 0.0))
    both = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert engine < count * 6_000
    assert both - engine < count * 6_000
