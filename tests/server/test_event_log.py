"""What the engine told is kept for those who watch, given to them from where they stopped, and forgotten in time."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

from shoal.scheduler.config import SchedulerConfig
from shoal.server.engine import event_log
from shoal.server.engine.event_log import EventLog
from shoal.server.engine.events import Seen, UsePolicy, UsesPolicy, Watch
from shoal.server.engine.messages import Ready, Sendable

READY = Ready(SchedulerConfig(num_blocks=8, max_model_len=64), 1, 2, "a fake", None)


class Event:
    def __init__(self, text: str) -> None:
        found = re.fullmatch(r"id: (\w+:\d+)\nevent: (\w+)\ndata: (.*)", text)
        assert found, text
        self.id, self.name = found[1], found[2]
        self.data: dict[str, Any] = json.loads(found[3])

    @property
    def what(self) -> str:
        return str(self.data["step"]["n"]) if self.name == "step" else self.name


class Scene:
    """A log with an engine that a hand plays."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.log = EventLog(clock=lambda: self.now)
        self.heard: list[Sendable] = []

    def connect(self) -> None:
        self.log.connect(READY, self.heard.append)

    def say(self, *numbers: int) -> None:
        for number in numbers:
            self.log.take(Seen(b'{"n":%d}' % number))

    def take_heard(self) -> list[Sendable]:
        heard, self.heard[:] = list(self.heard), []
        return heard


class Viewer:
    """Reads a stream, as far as it has come."""

    def __init__(self, log: EventLog, last_event_id: str = "") -> None:
        self.stream: AsyncGenerator[list[bytes], None] = log.follow(last_event_id)
        self.last_id = last_event_id

    async def read(self, count: int) -> list[str]:
        told: list[str] = []
        while len(told) < count:
            for text in b"".join(await asyncio.wait_for(anext(self.stream), 5)).decode().split("\n\n")[:-1]:
                event = Event(text)
                self.last_id = event.id
                told.append(event.what)
        return told

    async def leave(self) -> None:
        await self.stream.aclose()


def play(scene: Callable[[Scene], Awaitable[None]]) -> None:
    async def played() -> None:
        one = Scene()
        one.connect()
        await asyncio.wait_for(scene(one), 20)

    asyncio.run(played())


def test_the_engine_tells_only_while_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "LINGER_SECONDS", 0.01)

    async def scene(one: Scene) -> None:
        assert one.take_heard() == []
        first, second = Viewer(one.log), Viewer(one.log)
        assert await first.read(1) == ["snapshot"] == await second.read(1)
        assert one.take_heard() == [Watch(True)]
        await first.leave()
        await asyncio.sleep(0.05)
        assert one.take_heard() == []
        await second.leave()
        await asyncio.sleep(0.05)
        assert one.take_heard() == [Watch(False)]
        one.say(1, 2)
        assert await Viewer(one.log).read(1) == ["snapshot"], "nothing was kept of when nobody watched"

    play(scene)


def test_who_comes_later_gets_what_is_kept() -> None:
    async def scene(one: Scene) -> None:
        first = Viewer(one.log)
        await first.read(1)
        one.say(1, 2, 3)
        assert await first.read(3) == ["1", "2", "3"]
        assert await Viewer(one.log).read(4) == ["snapshot", "1", "2", "3"]

    play(scene)


def test_who_was_cut_off_goes_on_behind_the_last_event() -> None:
    async def scene(one: Scene) -> None:
        first = Viewer(one.log)
        await first.read(1)
        one.say(*range(200))
        assert await first.read(200) == [str(n) for n in range(200)]
        await first.leave()
        one.say(200, 201)
        assert await Viewer(one.log, first.last_id).read(2) == ["200", "201"]
        at_its_end = Viewer(one.log, first.last_id.replace(":200", ":202"))
        reading = asyncio.create_task(at_its_end.read(1))
        await asyncio.sleep(0.01)
        one.say(202)
        assert await reading == ["202"]

    play(scene)


@pytest.mark.parametrize("last_event_id", ["", "0:1", "nonsense", "00000000:99999999999999999", "☃"])
def test_an_id_that_says_nothing_gets_a_snapshot(last_event_id: str) -> None:
    async def scene(one: Scene) -> None:
        assert await Viewer(one.log, last_event_id).read(1) == ["snapshot"]

    play(scene)


def test_an_id_of_the_future_gets_a_snapshot() -> None:
    async def scene(one: Scene) -> None:
        viewer = Viewer(one.log)
        await viewer.read(1)
        assert await Viewer(one.log, viewer.last_id.replace(":0", ":77")).read(1) == ["snapshot"]

    play(scene)


def test_what_is_old_or_too_much_is_forgotten_and_who_falls_behind_gets_a_snapshot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(one: Scene) -> None:
        viewer = Viewer(one.log)
        await viewer.read(1)
        one.say(1)
        one.now += event_log.KEPT_SECONDS + 1
        one.say(2)
        assert await viewer.read(2) == ["snapshot", "2"]
        monkeypatch.setattr(event_log, "KEPT_BYTES", 1000)
        one.say(*range(100))
        told = await viewer.read(5)
        assert told[0] == "snapshot" and told[-1] == "99"
        assert sum(len(event) for _, event in one.log._kept) == one.log._num_bytes <= 1000

    play(scene)


def test_the_stream_outlives_the_engine() -> None:
    async def scene(one: Scene) -> None:
        viewer = Viewer(one.log)
        await viewer.read(1)
        one.say(1)
        one.take_heard()
        one.log.lose()
        one.connect()
        assert one.take_heard() == [Watch(True)]
        one.say(2)
        assert await viewer.read(4) == ["1", "lost", "snapshot", "2"]
        again = [Event(text) for text in b"".join(await anext(one.log.follow())).decode().split("\n\n")[:-1]]
        assert [event.data.get("num_engines") for event in again if event.name == "snapshot"] == [2, 2]
        assert [event.data["engine"] for event in again if event.name == "step"] == [1, 2]

    play(scene)


def test_a_snapshot_without_an_engine_has_no_limits() -> None:
    async def scene(one: Scene) -> None:
        one.log.lose()
        async with aclosing(one.log.follow()) as stream:
            assert Event((await anext(stream))[0].decode().strip()).data["limits"] is None

    play(scene)


def test_streams_end_with_the_server() -> None:
    async def scene(one: Scene) -> None:
        viewer = Viewer(one.log)
        await viewer.read(1)
        waiting = asyncio.create_task(viewer.read(1))
        await asyncio.sleep(0.01)
        one.log.close()
        with pytest.raises(StopAsyncIteration):
            await waiting

    play(scene)


def test_steps_are_told_of_one_by_one_only_if_somebody_watches() -> None:
    async def scene(one: Scene) -> None:
        one.log.tell_singly(5)
        assert one.take_heard() == []
        await Viewer(one.log).read(1)
        one.log.tell_singly(5)
        assert one.take_heard() == [Watch(True), Watch(True, 5)]

    play(scene)


def test_the_engine_says_which_policy_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "SWITCH_SECONDS", 0.05)

    async def scene(one: Scene) -> None:
        asked = asyncio.create_task(one.log.use_policy("static"))
        await asyncio.sleep(0)
        assert one.take_heard() == [UsePolicy("static")]
        one.log.take(UsesPolicy("static"))
        assert await asked and one.log.policy == "static"
        assert not await one.log.use_policy("fair"), "an engine with work does not answer"
        one.log.lose()
        one.connect()
        assert one.log.policy == "", "another engine has the policy of its settings"

    play(scene)
