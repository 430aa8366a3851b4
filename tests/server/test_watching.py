"""What those who watch an engine are told of its steps, at the engine's end; until somebody looks it is silent."""

from __future__ import annotations

from collections import Counter
from types import MethodType

import msgspec
import pytest

from shoal.scheduler.invariants import check_invariants
from shoal.scheduler.output import SamplingParams, SchedulingParams
from shoal.scheduler.policies import POLICIES
from shoal.server.engine import watching
from shoal.server.engine.events import Row, Seen, StepEvent, UsePolicy, UsesPolicy, Watch
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.messages import Abort, Command, EngineRequest, ForgetPrefixes, Report, Submit
from shoal.server.engine.watching import EVENT_SECONDS, Watching
from tests.fakes import Harness, generate, hashed

KNOBS = {name: policy.Knobs() for name, policy in POLICIES.items()}


@pytest.fixture(autouse=True)
def _free_of_charge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events cost nothing here, however slow the machine is, or they would be fewer."""
    monkeypatch.setattr(watching.time, "thread_time", lambda: 0.0)


class Wire:
    """Hands over what is put into `commands`, and keeps what it is told."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.sent: list[Report] = []

    def send(self, report: Report) -> None:
        self.sent.append(msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=Report))

    def receive(self, seconds: float | None) -> list[Command]:
        come, self.commands = self.commands, []
        return come


class Engine:
    """An engine's loop with somebody who may watch, turn by turn; each takes so many seconds."""

    def __init__(self, policy: str = "fcfs", seconds: float = 1.0, **limits: int) -> None:
        self.harness = Harness(policy=policy, **limits)
        self.seconds = seconds
        self.wire = Wire()
        core = self.harness.engine
        self.watching = Watching(self.wire, core, KNOBS, clock=lambda: self.harness.now)
        self.loop = EngineLoop(core, self.watching)

    def turn(self, *commands: Command) -> list[StepEvent]:
        """The events of a turn."""
        self.wire.commands += commands
        self.wire.sent.clear()
        self.loop.turn()
        self.harness.now += self.seconds
        check_invariants(self.harness.scheduler)
        return [msgspec.json.decode(one.event, type=StepEvent) for one in self.wire.sent if isinstance(one, Seen)]

    def watch(self) -> None:
        """Begin to watch, and let the idle engine be told of."""
        self.turn(Watch(True))
        self.turn()
        self.turn()

    def run(self, *commands: Command, most: int = 200) -> list[StepEvent]:
        """The events until nothing is left to do or to tell."""
        events = self.turn(*commands)
        for _ in range(most):
            events += self.turn()
        assert self.harness.scheduler.num_unfinished == 0
        return events


def asked(request_id: str, prompt: list[int] | int = 3, max_tokens: int = 2, **scheduling: object) -> EngineRequest:
    tokens = list(range(1, prompt + 1)) if isinstance(prompt, int) else prompt
    params = SamplingParams(max_tokens=max_tokens, seed=0)
    return EngineRequest(request_id, tokens, params, scheduling=SchedulingParams(**scheduling))  # type: ignore[arg-type]


def rows(event: StepEvent) -> dict[str, Row]:
    return {row.request_id: row for row in event.batch}


def test_nothing_is_done_until_somebody_looks() -> None:
    engine = Engine()
    core, policy = engine.harness.engine, engine.harness.scheduler.policy
    order = policy.order
    executor = core.executor
    assert engine.run(Submit([asked("a"), asked("b", max_tokens=5)])) == []
    assert core.executor is executor and not core.observers
    assert engine.turn(Watch(True)) == []
    assert core.executor is engine.watching
    engine.turn(Watch(False))
    assert core.executor is executor and not core.observers
    assert policy.order == order
    assert engine.run(Submit([asked("c")])) == []


def test_an_idle_engine_is_told_of_once() -> None:
    engine = Engine()
    engine.turn(Watch(True))
    events = engine.turn() + engine.turn() + engine.turn()
    assert [(event.batch, event.waiting, event.num_steps, event.blocks) for event in events] == [([], [], 0, 64 * ".")]


def test_a_request_is_told_of_from_its_prompt_to_its_end() -> None:
    engine = Engine(max_num_batched_tokens=8, max_chunk_tokens=4)
    engine.watch()
    events = engine.run(Submit([asked("a", prompt=10, max_tokens=3)]))
    told = [rows(event)["a"] for event in events if event.batch]
    assert [(row.state, row.num_computed_tokens, row.num_scheduled_tokens, row.num_tokens) for row in told] == [
        ("prefill", 0, 4, 10),
        ("prefill", 4, 4, 10),
        ("prefill", 8, 2, 11),
        ("decode", 10, 1, 12),
        ("decode", 11, 1, 13),
    ]
    assert {(row.row, row.num_prompt_tokens, row.max_num_tokens) for row in told} == {(0, 10, 13)}
    assert [request_id for event in events for request_id in event.joined] == ["a"]
    assert [request_id for event in events for request_id in event.left] == ["a"]
    assert [event.parts is not None for event in events if event.batch] == [True] * 5


def test_events_are_thinned_and_their_counts_are_not() -> None:
    engine = Engine(seconds=EVENT_SECONDS / 10)
    engine.watch()
    events = engine.run(Submit([asked("a", prompt=5, max_tokens=30), asked("b", max_tokens=60)]), most=300)
    num_busy = sum(bool(event.batch) for event in events)
    assert 2 <= num_busy <= 10, "some sixty steps of a tenth of the time between two events"
    stats = engine.harness.scheduler.stats()
    assert sum(event.num_steps for event in events) == stats.num_steps == 60
    assert sum(event.num_tokens for event in events) == stats.num_step_tokens == 5 + 29 + 3 + 59
    assert sum(event.num_output_tokens for event in events) == 30 + 60
    assert Counter(one for event in events for one in event.joined) == {"a": 1, "b": 1}
    assert Counter(one for event in events for one in event.left) == {"a": 1, "b": 1}
    assert 60 <= sum(event.seconds for event in events) / engine.seconds <= 75


def test_steps_are_told_of_one_by_one_when_that_is_asked() -> None:
    engine = Engine(seconds=EVENT_SECONDS / 100)
    engine.turn(Submit([asked("a", max_tokens=50)]), Watch(True))
    engine.turn()
    events = [event for _ in range(12) for event in engine.turn(*([Watch(True, 10)] if not _ else []))]
    assert [event.num_steps for event in events[1:10]] == [1] * 9
    assert [event.number for event in events[:10]] == list(range(events[0].number, events[0].number + 10))


def test_events_take_a_bounded_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one takes a millisecond, the next is a hundred later."""
    costs = iter(n / 1000 for n in range(10_000))  # each look at the clock is a millisecond later
    monkeypatch.setattr(watching.time, "thread_time", lambda: next(costs))
    engine = Engine(seconds=0.01)
    engine.turn(Watch(True))
    events = engine.run(Submit([asked("a", max_tokens=100)]))
    assert min(event.seconds for event in events[2:]) >= 0.1


def test_the_map_is_that_of_the_block_pool() -> None:
    engine = Engine(block_size=4, num_blocks=16)
    engine.run(Submit([asked("before", prompt=8, max_tokens=1)]))
    engine.watch()
    engine.turn(Submit([asked("a", prompt=12, max_tokens=9), asked("b", prompt=12, max_tokens=9)]))
    scheduler = engine.harness.scheduler
    tables = {name: list(request.block_ids) for name, request in scheduler.running.items()}
    held = [[request.row for request in scheduler.running.values() if n in request.block_ids] for n in range(16)]
    cached = [scheduler.kv_cache.pool.is_evictable(n) for n in range(16)]
    expected = [
        "+" if len(by) > 1 else chr(48 + by[0]) if by else "-" if is_cached else "."
        for by, is_cached in zip(held, cached, strict=True)
    ]
    (event,) = engine.turn()
    assert (event.tables, event.blocks) == (tables, "".join(expected))
    assert set(event.blocks) == {"+", "0", "1", "."}, "the prompts begin alike"
    assert event.num_owned_blocks == sum(map(bool, held)) and event.num_blocks == 16
    assert event.num_prefix_hits == 16
    engine.run(ForgetPrefixes())


def test_a_large_pool_has_a_coarse_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.server.engine.picture.MAX_CELLS", 10)
    engine = Engine(block_size=4, num_blocks=64)
    engine.watch()
    engine.turn(Submit([asked("a", prompt=40, max_tokens=9)]))
    (event,) = engine.turn()
    assert event.blocks_per_cell == 7
    assert event.blocks == "00........"


@pytest.mark.parametrize(
    ("policy", "limits", "reasons"),
    [
        ("fcfs", {"max_num_seqs": 1, "max_num_batched_tokens": 64}, ["rows", "behind"]),
        ("fcfs", {"num_blocks": 4}, ["blocks", "behind"]),
        ("fcfs", {"max_num_batched_tokens": 10, "max_num_seqs": 8}, ["budget", "behind"]),
        ("static", {"max_num_seqs": 2}, ["policy"]),
    ],
)
def test_who_waits_is_told_why(policy: str, limits: dict[str, int], reasons: list[str]) -> None:
    engine = Engine(policy, block_size=4, **limits)
    engine.watch()
    engine.turn(Submit([asked(name, prompt=10, max_tokens=6) for name in "abc"]))
    event = next(event for _ in range(3) for event in engine.turn() if event.batch)
    assert [one.reason for one in event.waiting] == reasons
    assert [one.request_id for one in event.waiting] == list("abc")[-len(reasons) :]
    assert event.num_waiting == len(reasons)
    assert {one.num_blocks for one in event.waiting} == {3}
    engine.run()


def test_a_policy_is_never_asked_more_than_without() -> None:
    """`static` acts on the question whether it admits a request."""
    alone, watched = Engine("static", max_num_seqs=2), Engine("static", max_num_seqs=2)
    watched.turn(Watch(True))
    alone.turn()
    for engine in (alone, watched):
        for name in "abcde":
            engine.turn(Submit([asked(name, max_tokens=4)]))
        engine.run()
    assert watched.harness.chunks == alone.harness.chunks


def test_a_preempted_request_waits_for_the_one_that_took_its_place() -> None:
    engine = Engine("priority", max_num_seqs=1, seconds=EVENT_SECONDS / 5)
    engine.watch()
    engine.turn(Submit([asked("low", max_tokens=20, priority=5)]))
    events = engine.turn(Submit([asked("high", max_tokens=20)]))
    events += engine.run()
    assert [event.preempted for event in events if event.preempted] == [{"low": "high"}]
    (first, *_) = [one for event in events for one in event.waiting if one.num_preemptions]
    assert (first.request_id, first.gave_way_to, first.reason) == ("low", "high", "rows")


def test_paused_requests_keep_their_rows() -> None:
    engine = Engine("fair", max_num_seqs=3)
    engine.harness.scheduler.policy.knobs = KNOBS["fair"].select({"fair_lead": 2.0})
    engine.watch()
    events = engine.run(Submit([asked(name, max_tokens=20, client=name[0]) for name in ("x1", "x2", "y")]))
    assert any(row.state == "pause" and row.num_scheduled_tokens == 0 for event in events for row in event.batch)


def test_padding_is_told_of() -> None:
    engine = Engine("static", max_num_seqs=2)
    engine.watch()
    events = engine.run(Submit([asked("short", max_tokens=2), asked("long", max_tokens=8)]))
    assert {row.request_id for event in events for row in event.batch if row.state == "padding"} == {"short"}


def test_drafted_tokens_are_told_of() -> None:
    harness = Harness(choose=lambda _, context: len(context) % 3, draft=lambda _, context: [len(context) % 3, 7])
    engine = Engine()
    engine.harness = harness
    engine.watching = Watching(engine.wire, harness.engine, KNOBS, clock=lambda: harness.now)
    engine.loop = EngineLoop(harness.engine, engine.watching)
    engine.watch()
    events = engine.run(Submit([asked("a", max_tokens=12)]))
    verified = [row for event in events for row in event.batch if row.num_spec_tokens]
    assert {(row.num_spec_tokens, row.num_accepted_tokens) for row in verified[:-1]} == {(2, 1)}
    stats = harness.scheduler.stats()
    assert sum(event.num_draft_tokens for event in events) == stats.num_draft_tokens > 0
    assert sum(sum(event.num_accepted_tokens_per_pos) for event in events) == sum(stats.num_accepted_tokens_per_pos)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_who_watches_changes_nothing(policy: str) -> None:
    def play(*commands: Command) -> tuple[Engine, dict[str, list[int]]]:
        engine = Engine(policy, num_blocks=12, max_num_seqs=3, max_num_batched_tokens=12)
        news: dict[str, list[int]] = {}
        engine.turn(*commands)
        engine.turn(Submit([asked(f"r{n}", prompt=3 + n, max_tokens=4 + n, client=str(n % 2)) for n in range(6)]))
        for turn in range(200):
            engine.turn(*([Abort(["r3"])] if turn == 5 else []))
            for report in engine.wire.sent:
                for output in getattr(report, "outputs", ()):
                    news.setdefault(output.request_id, []).extend(output.token_ids)
        return engine, news

    (alone, expected), (watched, news) = play(), play(Watch(True))
    assert watched.harness.chunks == alone.harness.chunks
    assert news == expected
    params = SamplingParams(max_tokens=9, seed=0)
    assert news["r5"] == generate(hashed(50), "r5", list(range(1, 9)), params)


def test_another_policy_is_used_when_nothing_is_unfinished() -> None:
    engine = Engine()
    engine.turn(Watch(True))
    engine.turn(Submit([asked("a", max_tokens=5)]))
    engine.turn(UsePolicy("sjf"))
    assert engine.harness.scheduler.policy.name == "fcfs"
    reports = []
    for _ in range(10):
        engine.turn()
        reports += engine.wire.sent
    assert UsesPolicy("sjf") in reports
    events = engine.run(Submit([asked("b")]))
    assert {event.policy for event in events} == {"sjf"}
    engine.turn(Watch(False))
    policy = engine.harness.scheduler.policy
    assert policy.order == MethodType(type(policy).order, policy)
