"""Engines and API processes over TCP: real sockets in one process, and engines that are played by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from itertools import count
from typing import ClassVar

import pytest
import zmq

import shoal.cluster.fleet as fleet_module
import shoal.cluster.link as link_module
from shoal.cluster.fleet import Fleet
from shoal.cluster.gateway import Gateway
from shoal.cluster.link import Link
from shoal.cluster.messages import Endpoint, Welcome
from shoal.cluster.secret import Keys
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import ConfigError, EngineError
from shoal.scheduler.output import FinishReason, RequestOutput, SamplingParams, SchedulerStats
from shoal.server.engine.client import EngineClient
from shoal.server.engine.messages import Abort, Command, EngineRequest, ForgetPrefixes, News, Ready, Submit
from shoal.server.engine.router import Router
from shoal.server.metrics import NO_STATS, Metrics

SECRET, FINGERPRINT = "a secret of the test", "fp_0"
KEYS = Keys.of(SECRET)
LIMITS = SchedulerConfig(num_blocks=64, block_size=4, max_model_len=100, max_num_seqs=4, max_num_batched_tokens=16)
_replicas = count()


class Played:
    """An engine that takes commands and says what the test has it say."""

    all: ClassVar[list[Played]] = []

    def __init__(
        self, *, keys: Keys = KEYS, its_version: str = version("shoal"), fingerprint: str = FINGERPRINT
    ) -> None:
        ready = Ready(LIMITS, 1, 2, "by hand", None)
        self.gateway = Gateway("127.0.0.1", keys, Welcome(its_version, fingerprint, ready, NO_STATS))
        self.endpoint = Endpoint(f"r{next(_replicas)}", f"tcp://127.0.0.1:{self.gateway.port}", fingerprint)
        self.commands: list[Command] = []
        self._serving = asyncio.create_task(self._serve())
        self.all.append(self)

    async def _serve(self) -> None:
        while True:
            self.commands += self.gateway.receive(0)
            await asyncio.sleep(0.002)

    def say(self, *outputs: RequestOutput, num_running: int = 0, num_preemptions: int = 0) -> None:
        self.gateway.send(News(list(outputs), SchedulerStats(num_running, 0, 0.0, num_preemptions, 0, 0)))

    def asked(self) -> list[str]:
        return [one.request_id for command in self.commands if isinstance(command, Submit) for one in command.requests]

    def aborted(self) -> list[str]:
        return [one for command in self.commands if isinstance(command, Abort) for one in command.request_ids]

    def die(self) -> None:
        self._serving.cancel()
        self.gateway._socket.close(linger=0)


class Api:
    """An API process: a router, and a fleet that joins it to engines."""

    def __init__(self, fingerprint: str = FINGERPRINT) -> None:
        self.metrics = metrics = Metrics("fake")
        self.router = Router([], metrics)
        self.fleet = Fleet(self.router, lambda name: EngineClient(name, metrics), KEYS, fingerprint)

    async def join(self, *engines: Played) -> None:
        self.fleet.update([engine.endpoint for engine in engines])
        await until(lambda: self.num_connected == len(engines))

    @property
    def num_connected(self) -> int:
        return sum(client.is_connected for client in self.router.clients)

    def submit(self, name: str, token_id: int = 1):  # type: ignore[no-untyped-def]
        return self.router.submit([EngineRequest(name, [token_id], SamplingParams(max_tokens=8, seed=1))])


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110 (what changes is in another's keeping)
            await asyncio.sleep(0.005)


def play(scene: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(250):
            await scene()

    try:
        asyncio.run(limited())  # cancels all that still works
    finally:
        while Played.all:
            Played.all.pop().gateway._socket.close(linger=0)


def test_two_api_processes_share_an_engine_and_each_is_told_of_its_own() -> None:
    async def scene() -> None:
        engine, apis = Played(), [Api(), Api()]
        for api in apis:
            await api.join(engine)
        first, second = apis[0].submit("a"), apis[1].submit("b")
        await until(lambda: sorted(engine.asked()) == ["a", "b"])
        engine.say(RequestOutput("a", [7]), RequestOutput("b", [8]), num_running=2)
        assert [output.token_ids for output in await first.get()] == [[7]]
        assert [output.token_ids for output in await second.get()] == [[8]]
        assert [api.router.clients[0].load for api in apis] == [2, 2]
        apis[0].router.abort(["a"])
        apis[0].router.forget_prefixes()
        await until(lambda: engine.aborted() == ["a"] and ForgetPrefixes() in engine.commands)
        engine.say(RequestOutput("b", [9], FinishReason.STOP))
        assert [output.finish_reason for output in await second.get()] == [FinishReason.STOP]
        assert [api.router.clients[0].load for api in apis] == [1, 0] or apis[1].router.num_unfinished == 0

    play(scene)


def test_what_an_engine_counted_before_an_api_process_joined_is_not_counted_there() -> None:
    """Neither when it joins, nor when it joins again after its connection broke."""

    async def scene() -> None:
        engine, api = Played(), Api()

        def counted() -> tuple[float, float]:
            totals = api.metrics.totals()
            return totals["num_requests_running"], totals["num_preemptions"]

        engine.say(num_running=3, num_preemptions=1000)
        for total in (0, 2):
            await api.join(engine)
            assert counted() == (3, total)
            engine.say(num_running=3, num_preemptions=1000 + total + 2)
            await until(lambda seen=total + 2: counted() == (3, seen))
            api.fleet.update([])
            await until(lambda: api.num_connected == 0)
            assert counted() == (0, total + 2)

    play(scene)


def test_what_an_engine_that_is_gone_had_goes_on_at_another() -> None:
    async def scene() -> None:
        engines, api = [Played(), Played()], Api()
        await api.join(*engines)
        submissions = [api.submit("a", 1), api.submit("b", 2)]
        await until(lambda: all(engine.asked() for engine in engines))
        lost = next(engine for engine in engines if engine.asked() == ["a"])
        left = next(engine for engine in engines if engine is not lost)
        lost.say(RequestOutput("a", [7]))
        assert (await submissions[0].get())[0].token_ids == [7]
        lost.die()
        await until(lambda: left.asked() == ["b", "a"])
        (again,) = [one for command in left.commands if isinstance(command, Submit) for one in command.requests][1:]
        assert again.output_token_ids == [7]

    play(scene)


def test_the_requests_of_an_api_process_that_is_gone_are_aborted() -> None:
    async def scene() -> None:
        engine, api, other = Played(), Api(), Api()
        await api.join(engine)
        await other.join(engine)
        api.submit("a")
        other.submit("b")
        await until(lambda: len(engine.asked()) == 2)
        await api.fleet.close()

        def tells() -> bool:
            engine.say(num_running=2)
            return engine.aborted() == ["a"]

        await until(tells)

    play(scene)


def test_a_request_that_comes_again_takes_the_place_of_itself() -> None:
    async def scene() -> None:
        engine, api = Played(), Api()
        await api.join(engine)
        api.submit("a")
        await until(lambda: engine.asked() == ["a"])
        endpoint = engine.endpoint
        api.fleet.update([])
        await until(lambda: not api.num_connected)
        api.fleet.update([endpoint])
        await until(lambda: engine.asked() == ["a", "a"])
        kinds = [type(command) for command in engine.commands]
        assert kinds[-2:] == [Abort, Submit] or kinds.count(Abort) == 1

    play(scene)


def test_noise_does_not_disturb_an_engine() -> None:
    async def scene() -> None:
        engine, api = Played(), Api()
        await api.join(engine)
        stranger = zmq.Context.instance().socket(zmq.DEALER)
        KEYS.guard_api(stranger)
        stranger.connect(engine.endpoint.address)
        for noise in ([b"\xc1"], [b""], [b"a", b"b", b"c"]):
            stranger.send_multipart(noise)
        api.submit("a")
        await until(lambda: engine.asked() == ["a"])
        stranger.close(linger=0)

    play(scene)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"keys": Keys.of("a secret of another")}, "does not know this cluster's secret"),
        ({"its_version": "0.0.1"}, "has version 0.0.1, and this server"),
        ({"fingerprint": "fp_1"}, "has fingerprint fp_1, and this server fp_0"),
        (None, "nobody listens at tcp://127.0.0.1:1"),
    ],
)
def test_what_cannot_be_joined_is_named_at_once(engine: dict[str, object] | None, message: str) -> None:
    async def scene() -> None:
        endpoint = Endpoint("r", "tcp://127.0.0.1:1", "") if engine is None else Played(**engine).endpoint  # type: ignore[arg-type]
        client = EngineClient("0", Metrics("fake"))
        with pytest.raises(EngineError, match=message):
            await Link(endpoint, client, KEYS, FINGERPRINT).run()
        assert not client.is_connected

    play(scene)


def test_an_address_at_which_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "WELCOME_SECONDS", 0.3)

    async def scene() -> None:
        silent = zmq.Context.instance().socket(zmq.ROUTER)
        KEYS.guard_engine(silent)
        port = silent.bind_to_random_port("tcp://127.0.0.1")
        with pytest.raises(EngineError, match="does not answer"):
            await Link(Endpoint("r", f"tcp://127.0.0.1:{port}", ""), EngineClient("0", Metrics("f")), KEYS, "").run()
        silent.close(linger=0)

    play(scene)


def test_a_fleet_has_only_engines_of_its_own_fingerprint_and_uses_clients_again() -> None:
    async def scene() -> None:
        api, engines = Api(), [Played(), Played(fingerprint="fp_1"), Played()]
        api.fleet.update([engine.endpoint for engine in engines])
        await until(lambda: api.num_connected == 2)
        engines[0].die()
        await until(lambda: api.num_connected == 1)
        another = Played()
        api.fleet.update([engines[2].endpoint, another.endpoint])
        await until(lambda: api.num_connected == 2)
        assert len(api.router.clients) == 2

    play(scene)


def test_without_any_engine_requests_end_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "LAST_SECONDS", 0.3)

    async def scene() -> None:
        api, engine = Api(), Played()
        await api.join(engine)
        submission = api.submit("a")
        engine.die()
        await until(lambda: not api.num_connected)
        api.fleet.check()
        assert api.router.num_unfinished == 1
        await asyncio.sleep(0.4)
        api.fleet.check()
        with pytest.raises(EngineError, match="no engine is left that has the fingerprint fp_0"):
            await submission.get()

    play(scene)


def test_a_secret_is_long_enough_and_makes_the_same_keys_everywhere() -> None:
    with pytest.raises(ConfigError, match="at least 16 characters"):
        Keys.of("short")
    assert Keys.of(SECRET) == KEYS
    assert len({*KEYS.engine, *KEYS.api, *Keys.of("a secret of another").engine}) == 6
