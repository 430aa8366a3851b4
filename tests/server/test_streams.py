"""Answers that outlive their connections, on a virtual clock: whoever comes and goes, no event is lost or doubled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.scheduler.errors import EngineError, InvalidRequestError
from shoal.server import streams
from shoal.server.errors import IdempotencyKeyReuseError, NotFoundError, SlowClientError, StreamExpiredError
from shoal.server.sinks import poured
from shoal.server.streams import ANSWER_BYTES, Answer, Events, StreamStore
from tests.examples import examples

Value = TypeVar("Value")
GRACE = 10.0
OWNER, KEY = "a key", ("a key", "once")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes when nothing is left to do."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready:  # type: ignore[attr-defined]
            due = [timer.when() for timer in self._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
            assert due, "nothing will ever happen"
            self.now = max(self.now, min(due))
        super()._run_once()  # type: ignore[misc]


def run(work: Coroutine[Any, Any, Value]) -> Value:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


def now() -> float:
    return asyncio.get_running_loop().time()


class Work:
    """Makes events at given times.

    Args:
        portions: seconds to wait for each, and how many events it has.

    Attributes:
        closed_at: when it ended or was aborted.
    """

    def __init__(self, portions: list[tuple[float, int]], error: Exception | None = None) -> None:
        self._portions = portions
        self._error = error
        numbers = iter(range(10_000))
        self.made = [[b"event %d;" % next(numbers) for _ in range(size)] for _, size in portions]
        self.seconds = sum(wait for wait, _ in portions)
        self.closed_at: float | None = None

    async def events(self) -> Events:
        try:
            for (wait, _), portion in zip(self._portions, self.made, strict=True):
                await asyncio.sleep(wait)
                yield portion
            if self._error is not None:
                raise self._error
        finally:
            self.closed_at = now()

    @property
    def whole(self) -> list[bytes]:
        return [event for portion in self.made for event in portion]


def begin(store: StreamStore, work: Work, name: str = "a", key: streams.Key | None = None) -> Answer:
    answer = Answer(name, OWNER, {}, is_stream=True, key=key)
    store.begin(answer, poured(work.events()))
    return answer


async def read(store: StreamStore, answer: Answer, after: int = 0, most: int = 10_000, **how: bool) -> list[bytes]:
    """What a client reads of a stream before it leaves, in the middle of a portion or at its end."""
    events: list[bytes] = []
    async with aclosing(store.read(answer, after, **how)) as portions:
        while len(events) < most and (portion := await anext(portions, None)):
            events += portion
    return events[:most]


def check_bytes(store: StreamStore) -> None:
    answers = store._answers.values()
    assert all(answer.size == ANSWER_BYTES + sum(map(len, answer.events)) for answer in answers)
    assert store._num_bytes == sum(answer.size for answer in answers)


waits = st.sampled_from([0.0, 0.4, 3.0])
portions = st.lists(st.tuples(waits, st.integers(1, 3)), max_size=8)
visits = st.lists(st.tuples(st.sampled_from([0.01, 5.03, 9.07, 11.1, 25.3]), st.integers(1, 6)), max_size=6)


@settings(max_examples=examples(500))
@given(portions, visits)
def test_whoever_comes_and_goes_reads_each_event_once(
    portions: list[tuple[float, int]], visits: list[tuple[float, int]]
) -> None:
    """Whoever comes too late finds nothing, and the work was aborted when the time was over, or had ended."""

    async def play() -> None:
        store, work = StreamStore(GRACE), Work(portions)
        begin(store, work)
        seen: list[bytes] = []
        left_at = 0.0
        for away, most in [*visits, (0.01, 10_000)]:
            await asyncio.sleep(away)
            is_aborted = left_at + GRACE < work.seconds
            if now() > (left_at if is_aborted else max(left_at, work.seconds)) + GRACE:
                assert work.closed_at == pytest.approx(left_at + GRACE if is_aborted else work.seconds)
                with pytest.raises(NotFoundError, match="10 s"):
                    store.find("a", OWNER)
                break
            seen += await read(store, store.find("a", OWNER), len(seen), most, takes_over=True)
            left_at = now()
            check_bytes(store)
        else:
            assert seen == work.whole
        assert seen == work.whole[: len(seen)]
        await asyncio.sleep(100)
        assert work.closed_at is not None
        check_bytes(store)
        assert not (store._answers or store._ended or store._claims or store._num_bytes)

    run(play())


@settings(max_examples=examples(300))
@given(portions, visits, st.integers(1, 60))
def test_what_is_too_much_is_dropped_when_read_and_else_ends_the_stream(
    portions: list[tuple[float, int]], visits: list[tuple[float, int]], room: int
) -> None:
    async def play() -> None:
        store, work = StreamStore(1000.0), Work(portions)
        answer = begin(store, work)
        seen: list[bytes] = []
        try:
            for away, most in [*visits, (0.01, 10_000)]:
                await asyncio.sleep(away)
                seen += await read(store, answer, len(seen), most)
                assert answer.size <= ANSWER_BYTES + room + 3 * len(b"event 10;")
        except StreamExpiredError as error:
            assert answer.num_dropped > len(seen) and f"from event {answer.num_dropped + 1} on" in error.message
        except SlowClientError:
            assert sum(map(len, answer.events)) > room
        else:
            assert seen == work.whole
        assert seen == work.whole[: len(seen)]
        check_bytes(store)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "MAX_STREAM_BYTES", ANSWER_BYTES + room)
        run(play())


def test_a_stream_that_is_read_may_be_longer_than_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_STREAM_BYTES", ANSWER_BYTES + 100)

    async def play() -> None:
        store, work = StreamStore(GRACE), Work([(1.0, 1)] * 500)
        answer = begin(store, work)
        assert await read(store, answer) == work.whole
        with pytest.raises(StreamExpiredError, match="from event 4"):
            answer.check(0)
        check_bytes(store)

    run(play())


def test_an_answer_that_needs_no_reader_goes_on_and_has_its_last_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_STREAM_BYTES", ANSWER_BYTES + 100)

    async def play() -> None:
        store, work = StreamStore(GRACE), Work([(1.0, 1)] * 500)
        answer = Answer("a", OWNER, {}, is_stream=True, needs_reader=False)
        store.begin(answer, poured(work.events()))
        await asyncio.sleep(work.seconds + 10 * GRACE)
        assert store.find("a", OWNER) is answer and answer.is_ended and answer.error is None
        assert await read(store, answer, answer.num_dropped) == work.whole[answer.num_dropped :]
        check_bytes(store)
        store.forget(answer)
        assert not store._num_bytes

    run(play())


def test_an_answer_that_is_too_large_is_given_to_those_who_wait_and_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_BYTES", ANSWER_BYTES + 100)

    async def play() -> None:
        store, work = StreamStore(GRACE), Work([(1.0, 100)])
        answer = begin(store, work)
        assert await read(store, answer) == work.whole
        assert not store._answers and not store._num_bytes

    run(play())


def test_running_streams_share_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_BYTES", 2 * ANSWER_BYTES + 6000)

    async def play(num_streams: int) -> set[type[Exception] | None]:
        store = StreamStore(1000.0)
        answers = [begin(store, Work([(1.0, 1)] * 500), f"{number}") for number in range(num_streams)]
        await asyncio.sleep(600)
        check_bytes(store)
        assert store._num_bytes <= streams.MAX_BYTES
        return {answer.error and type(answer.error) for answer in answers}

    assert run(play(1)) == {None}
    assert run(play(2)) == {SlowClientError, None}  # half of it does not hold 500 events; then one has all of it


def test_the_oldest_that_have_ended_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_BYTES", 3 * ANSWER_BYTES + 100)

    async def play() -> None:
        store = StreamStore(1000.0)
        running = begin(store, Work([(1.0, 1)] * 50), "running")
        ended = []
        for number in range(4):
            ended.append(begin(store, Work([(0.0, 3)]), f"ended {number}"))
            await asyncio.sleep(1)
        assert list(store._answers) == ["running", "ended 2", "ended 3"]
        check_bytes(store)
        assert await read(store, ended[0]) == Work([(0.0, 3)]).whole, "who has found it may read it"
        assert await read(store, running) == Work([(0.0, 50)]).whole

    run(play())


def test_who_comes_back_takes_over_and_who_joins_does_not() -> None:
    async def play() -> None:
        store, work = StreamStore(GRACE), Work([(1.0, 1)] * 6)
        answer = begin(store, work)
        first = asyncio.create_task(read(store, answer))
        joined = asyncio.create_task(read(store, answer))
        await asyncio.sleep(2.5)
        back = asyncio.create_task(read(store, answer, 1, takes_over=True))
        for ended in (first, joined):
            with pytest.raises(StreamExpiredError, match="another connection"):
                await ended
        assert now() == 2.5
        joined = asyncio.create_task(read(store, answer))
        assert await back == work.whole[1:]
        assert await joined == work.whole

    run(play())


@pytest.mark.parametrize("error", [EngineError("it died"), ValueError("it died of a fault of ours")])
def test_an_error_ends_the_stream_for_all_who_read_it(error: Exception) -> None:
    async def play() -> None:
        store = StreamStore(GRACE)
        answer = begin(store, Work([(1.0, 2)], error))
        for after in (0, 1, 2):
            with pytest.raises(type(error), match="it died"):
                await read(store, answer, after)
        assert answer.num_events == 2

    run(play())


def test_a_stream_belongs_to_its_key_and_has_only_the_events_that_it_has() -> None:
    async def play() -> None:
        store = StreamStore(GRACE)
        answer = begin(store, Work([(1.0, 2), (1.0, 2)]))
        for name, owner in (("a", None), ("a", "another key"), ("b", OWNER)):
            with pytest.raises(NotFoundError):
                store.find(name, owner)
        await asyncio.sleep(1.5)
        answer.check(2)
        with pytest.raises(InvalidRequestError, match="had only 2"):
            answer.check(3)
        await asyncio.sleep(1)
        answer.check(5)  # its end was read

    run(play())


def test_what_is_ended_on_purpose_is_aborted_at_once() -> None:
    async def play() -> None:
        store, work = StreamStore(GRACE), Work([(1.0, 1)] * 6)
        answer = begin(store, work, key=await claimed(store))
        reading = asyncio.create_task(read(store, answer))
        await asyncio.sleep(2.5)
        store.forget(answer)
        with pytest.raises(StreamExpiredError, match="aborted"):
            await reading
        assert work.closed_at == 2.5
        assert not (store._answers or store._ended or store._claims or store._num_bytes)

    run(play())


async def claimed(store: StreamStore) -> streams.Key:
    assert await store.claim(KEY, b"digest") is None
    return KEY


def test_a_key_is_one_piece_of_work() -> None:
    async def ask(store: StreamStore, wait: float) -> tuple[Answer, bool]:
        """As a route does: admission takes two seconds."""
        await asyncio.sleep(wait)
        if (known := await store.claim(KEY, b"digest")) is not None:
            return known, False
        await asyncio.sleep(2)
        return begin(store, Work([(5.0, 1)]), f"begun at {now()}", KEY), True

    async def play() -> None:
        store = StreamStore(GRACE)
        asked = [ask(store, wait) for wait in (0.0, 0.0, 1.0, 4.0, 16.0, 18.0, 40.0)]
        answers = await asyncio.gather(*asked)
        assert [answer.id for answer, _ in answers] == ["begun at 2.0"] * 5 + ["begun at 20.0", "begun at 42.0"]
        assert [is_first for _, is_first in answers] == [True, False, False, False, False, True, True]
        with pytest.raises(IdempotencyKeyReuseError):
            await store.claim(KEY, b"another digest")
        assert await store.claim(("another key", "once"), b"another digest") is None

    run(play())


def test_a_request_that_is_refused_leaves_its_key_to_the_next() -> None:
    async def play() -> None:
        store = StreamStore(GRACE)
        await claimed(store)
        waiting = [asyncio.create_task(store.claim(KEY, b"digest")) for _ in range(2)]
        await asyncio.sleep(1)
        with pytest.raises(IdempotencyKeyReuseError):
            await store.claim(KEY, b"another digest")
        assert not any(task.done() for task in waiting)
        store.release(KEY)
        assert await waiting[0] is None and not waiting[1].done()
        answer = begin(store, Work([]), key=KEY)
        store.release(KEY)  # changes nothing any more
        assert await waiting[1] is answer

    run(play())
