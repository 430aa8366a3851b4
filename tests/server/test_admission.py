"""Who is taken and who is refused, before an engine that is played on a virtual clock."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from math import inf
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import QueueFullError
from shoal.scheduler.output import FinishReason, RequestOutput, SamplingParams, SchedulerStats
from shoal.server.engine.admission import Admission, Drain
from shoal.server.engine.client import EngineClient
from shoal.server.engine.messages import Abort, Command, EngineRequest, News, Ready, Submit
from shoal.server.metrics import Metrics

METRICS = Metrics("fake")
STATS = SchedulerStats(0, 0, 0.0, 0, 0, 0)
LIMIT = 2.0  # max_queue_seconds
LOOP = asyncio.new_event_loop()  # in which clients take news


@pytest.fixture(scope="module", autouse=True)
def closed_loop() -> Iterator[None]:
    yield
    LOOP.close()


class Served(NamedTuple):
    """When a request came, and how many seconds later its first and its last token."""

    came: float
    first: float
    last: float


class World:
    """A server whose rows get a token each in each step, first come first served.

    Attributes:
        served: the requests that have ended.
        refused: the errors of the others, with the time.
        num_idle: rows that had nothing to do, over all steps.
    """

    def __init__(self, num_rows: int = 8, step_seconds: float = 0.05, **bounds: float) -> None:
        self.now = 1000.0
        self.num_rows, self.step_seconds = num_rows, step_seconds
        num_waiting = int(bounds.pop("max_num_waiting", 1024))
        limits = SchedulerConfig(
            num_blocks=4096, max_model_len=4096, max_num_seqs=num_rows, max_num_waiting=num_waiting
        )
        self.client = EngineClient("0", METRICS, clock=lambda: self.now)
        self.client.admission = Admission(**({"max_queue_seconds": LIMIT} | bounds))
        self.client.connect(Ready(limits, 1, 2, "played", None), self.take)
        self.served: list[Served] = []
        self.refused: list[tuple[float, QueueFullError]] = []
        self.num_idle = 0
        self._ids = map(str, count())
        self._lengths: dict[str, int] = {}
        self._came: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._unfinished: dict[str, int] = {}  # tokens so far, in order of arrival

    def take(self, command: Command) -> None:
        match command:
            case Submit(requests):
                self._unfinished |= {one.request_id: len(one.output_token_ids) for one in requests}
            case Abort(request_ids):
                for request_id in request_ids:
                    self._unfinished.pop(request_id, None)

    def ask(
        self, length: int, max_tokens: int | None = None, *, num_prompt_tokens: int = 1, timeout: float = inf
    ) -> bool:
        """Ask for a text that will have this length; whether it is taken."""
        name = next(self._ids)
        params = SamplingParams(max_tokens=max_tokens or length, seed=0)
        self._lengths[name], self._came[name] = length, self.now
        try:
            self.client.submit([EngineRequest(name, [0] * num_prompt_tokens, params)], timeout)
        except QueueFullError as error:
            self.refused.append((self.now, error))
            return False
        return True

    def step(self) -> None:
        self.now += self.step_seconds
        self.num_idle += max(self.num_rows - len(self._unfinished), 0)
        outputs = []
        for name in list(self._unfinished)[: self.num_rows]:
            self._unfinished[name] += 1
            self._first.setdefault(name, self.now)
            is_whole = self._unfinished[name] == self._lengths[name]
            outputs.append(RequestOutput(name, [5], FinishReason.STOP if is_whole else None))
            if is_whole:
                del self._unfinished[name]
                came = self._came[name]
                self.served.append(Served(came, self._first[name] - came, self.now - came))
        if outputs:
            LOOP.run_until_complete(self._give(News(outputs, STATS)))

    async def _give(self, news: News) -> None:
        self.client.take(news)

    def run(self, seconds: float, arrivals: Sequence[float] = (), ask: Callable[[], object] = lambda: None) -> None:
        """Let time pass, with a call of `ask` at each of these times from now."""
        began, left = self.now, list(reversed(arrivals))
        while self.now < began + seconds:
            while left and began + left[-1] <= self.now:
                left.pop()
                ask()
            self.step()

    def since(self, time: float) -> list[Served]:
        return [one for one in self.served if one.came >= time]


def poisson(rng: random.Random, rate: float, seconds: float) -> list[float]:
    times: list[float] = []
    while not times or times[-1] < seconds:
        times.append((times[-1] if times else 0.0) + rng.expovariate(rate))
    return times


def length_of(rng: random.Random, kind: str) -> tuple[int, int]:
    """The length of a text, and its max_tokens."""
    match kind:
        case "all alike":
            return 30, 30
        case "of all lengths":
            length = rng.randint(1, 60)
            return length, length
        case _:  # "ended early": what max_tokens says means nothing
            return min(1 + int(rng.expovariate(1 / 30)), 1000), 1000


KINDS = ("all alike", "of all lengths", "ended early")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(num_rows=st.integers(8, 16), overload=st.floats(2, 8), seed=st.integers(0, 2**32))
def test_under_overload_what_is_taken_is_served_soon_and_no_row_idles(
    kind: str, num_rows: int, overload: float, seed: int
) -> None:
    rng = random.Random(seed)
    world = World(num_rows, step_seconds=0.1)
    capacity = num_rows / 0.1 / 30
    for seconds in (20, 40):
        world.num_idle = 0
        world.run(seconds, poisson(rng, overload * capacity, seconds), lambda: world.ask(*length_of(rng, kind)))
    waits = [one.first for one in world.since(1020)]  # the burst of the beginning is over
    assert world.num_idle < 0.03 * num_rows * 40 / 0.1
    if kind == "ended early":
        assert sum(waits) / len(waits) < 1.5 * LIMIT
    else:
        assert max(waits) < LIMIT + 0.3
    assert len(world.refused) > len(world.served) / 2


def test_an_idle_server_takes_a_burst_and_a_busy_one_does_not() -> None:
    world = World(64, step_seconds=0.15)
    for _ in range(2):
        world.run(1.2, [i / 300 for i in range(300)], lambda: world.ask(30))
        assert not world.refused
        world.run(60)
        assert len(world.served) == 300 and max(one.last for one in world.served) < 300 / 64 * 30 * 0.15 + 5
        world.served.clear()
    world.run(30, [i / 100 for i in range(3000)], lambda: world.ask(30))
    began = world.now
    num_taken = sum(world.ask(30) for _ in range(300))
    assert num_taken < 64
    world.run(1.3 * 30 * 0.15 + LIMIT)
    assert world.client.num_unfinished == 0 and max(one.last for one in world.since(began)) < 30 * 0.15 + LIMIT + 0.3
    assert world.ask(30), "a row is free"


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({}, r"the request's turn would come in \d+\.\d s, but max_queue_seconds is 2 s"),
        ({"max_queue_seconds": inf, "max_num_waiting": 20}, r"max_num_seqs 8 \+ max_num_waiting 20"),
        (
            {"max_queue_seconds": inf, "max_queue_tokens": 2000},
            r"2000 prompt tokens wait, .* max_queue_tokens \(2000\)",
        ),
    ],
)
def test_who_comes_back_when_told_is_taken_and_not_long_before(bounds: dict[str, float], message: str) -> None:
    world = World(8, step_seconds=0.1, **bounds)
    world.run(20, [i / 10 for i in range(200)], lambda: world.ask(50, num_prompt_tokens=100))
    error = world.refused[-1][1]
    assert re.search(message, error.message)
    assert error.retry_after is not None and error.retry_after >= 1
    while world.ask(50, num_prompt_tokens=100):
        pass
    error = world.refused[-1][1]
    assert error.retry_after is not None
    if error.retry_after > 2:
        world.run(error.retry_after - 2)
        assert not world.ask(50, num_prompt_tokens=100)
        world.run(2)
    else:
        world.run(error.retry_after)
    assert world.ask(50, num_prompt_tokens=100)


def test_a_request_that_cannot_meet_its_own_deadline_is_refused() -> None:
    world = World(4, step_seconds=0.1)
    world.run(5, [0.0] * 4, lambda: world.ask(60))
    world.client.check_room(timeout=1.5)
    with pytest.raises(QueueFullError, match=r"turn would come in 1\.\d s, but its timeout is 0\.5 s"):
        world.client.check_room(timeout=0.5)
    world.run(1.2)
    world.client.check_room(timeout=0.1)


def test_a_prompt_beyond_the_bound_is_taken_if_none_waits() -> None:
    world = World(max_queue_tokens=10)
    assert world.ask(5, num_prompt_tokens=50)
    assert not world.ask(5, num_prompt_tokens=1)
    world.step()
    assert world.ask(5, num_prompt_tokens=11)


def test_the_time_without_an_engine_does_not_count() -> None:
    world = World(4, step_seconds=0.1)
    world.run(5, [0.0] * 4, lambda: world.ask(100))
    world.client.lose()
    world.now += 3
    world.client.connect(world.client.ready, world.take)
    with pytest.raises(QueueFullError, match=r"turn would come in 5\.\d s"):
        world.client.check_room()


@given(
    nums_left=st.lists(st.integers(1, 20), min_size=1, max_size=20),
    num_rows=st.integers(1, 8),
    data=st.data(),
)
def test_the_estimate_is_that_of_a_simulation(nums_left: list[int], num_rows: int, data: st.DataObject) -> None:
    """In which each row gets a token a second and no request ends early."""
    num_ends = data.draw(st.integers(1, len(nums_left)))
    drain = Drain()
    for second in range(1, 200):
        drain.note(second, is_full=True, num_tokens=num_rows)
    waiting, rows, seconds, ended = list(nums_left), [], 0, 0
    while ended < num_ends:
        rows += [waiting.pop(0) for _ in range(min(num_rows - len(rows), len(waiting)))]
        seconds += 1
        ended += rows.count(1)
        rows = [left - 1 for left in rows if left > 1]
    assert drain.seconds(nums_left, num_rows, num_ends) == pytest.approx(seconds)


def test_what_is_not_known_delays_nobody() -> None:
    drain = Drain()
    assert drain.seconds([5] * 9, 4, 6) == 0
    drain.note(100.0, is_full=False)
    drain.note(100.9, is_full=True, num_tokens=1)
    assert drain.seconds([5] * 9, 4, 6) == 0
    drain.note(101.5, is_full=True, num_tokens=1)
    assert drain.seconds([5] * 9, 4, 6) > 0
    drain.note(130.0, is_full=False)
    assert drain.seconds([5] * 9, 4, 6) == 0
    drain.note(133.0, is_full=True)
    assert drain.seconds([5] * 9, 4, 6) > 10, "an engine that gives no tokens"
