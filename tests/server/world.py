"""A simulated world: clients, the API side and engines that die, hang and delay, in virtual time.

The client, the journals, the supervisor and the engine's own loop, scheduler and cache are the server's; only the
model, the process around an engine and time are made up.  A history is a function of its seed.  The law is that every
request that was accepted ends exactly once: with what an undisturbed run gives, or with a typed error that has a cause.

`python -m tests.server.world 100000 7` plays that many histories, from this seed on.
"""

from __future__ import annotations

import asyncio
import logging
import selectors
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import cache
from math import inf
from multiprocessing import Pool
from random import Random
from typing import Any
from unittest import mock

import msgspec

import shoal.server.engine.supervisor as supervisor_module
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.engine import EngineCore
from shoal.scheduler.errors import EngineError, QueueFullError, ShoalError
from shoal.scheduler.output import FinishReason, RequestOutput, SamplingParams, SchedulerOutput
from shoal.scheduler.policies import POLICIES
from shoal.scheduler.scheduler import Scheduler
from shoal.server.engine.admission import Admission
from shoal.server.engine.client import MAX_DEATHS, EngineClient
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.messages import Command, EngineRequest, News, Ready
from shoal.server.engine.router import Router
from shoal.server.engine.submission import Submission
from shoal.server.engine.supervisor import MAX_FAILED_STARTS, EngineSupervisor
from shoal.server.errors import EngineUnavailableError, NotFoundError, RequestTimeoutError, SlowClientError
from shoal.server.metrics import Metrics
from shoal.server.settings import Settings, resolve
from shoal.server.sinks import poured
from shoal.server.streams import Answer, Events, StreamStore
from tests.fakes import FakeExecutor, InjectedError, digest, generate, hashed

VOCAB_SIZE = 50
HANG_SECONDS = GRACE_SECONDS = 5.0
LIMITS = SchedulerConfig(
    num_blocks=24, block_size=4, max_model_len=40, max_num_seqs=4, max_num_batched_tokens=16, max_num_waiting=8
)
CHOOSE = hashed(VOCAB_SIZE)
METRICS = Metrics("world")


# -- time ------------------------------------------------------------------------------------------------------------


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that does not wait: its clock jumps to the next thing that is to happen."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_NoWaiting(self))

    def time(self) -> float:
        return self.now


class _NoWaiting(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "somebody waits for what will never come"
        self._loop.now += timeout
        return []


# -- what happens ----------------------------------------------------------------------------------------------------


@dataclass
class Mishaps:
    """How often what goes wrong, and with which requests.

    Attributes:
        poison: ids of requests that kill the engine when they have so many output tokens.
        faulty: ids of requests whose steps fail.
    """

    death: float = 0.0
    hang: float = 0.0
    failed_start: float = 0.0
    poison: dict[str, int] = field(default_factory=dict)
    faulty: set[str] = field(default_factory=set)


class Death(BaseException):
    """The engine process ends amid a step."""


class SimulatedEngine:
    """Stands for an `EngineProcess`: the engine's own loop, on a wire that delays and, at its end, loses messages."""

    def __init__(self, world: World) -> None:
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.take: Callable[[News], None] = lambda news: None
        self.hangs: Callable[[], bool] = lambda: False
        self._world = world
        self._commands: deque[tuple[float, Command]] = deque()
        self._reports: list[News] = []
        self._arrived = asyncio.Event()
        self._executor = FakeExecutor(LIMITS.block_size, CHOOSE, world.draft if world.drafts else None)
        self._executor.fail = self._fail
        kind = POLICIES[world.policy]
        scheduler = Scheduler(LIMITS, kind(LIMITS, kind.Knobs()))
        self._loop = EngineLoop(EngineCore(scheduler, self._executor, world.clock), self)
        self.ready.set_result(Ready(LIMITS, 1, 1, "simulated", None))
        self.ended = asyncio.create_task(self._run())

    @classmethod
    async def start(cls, world: World, number: int) -> SimulatedEngine:
        await asyncio.sleep(world.random.uniform(0.0, 2.0))
        failed = world.random.random() < world.mishaps.failed_start
        world.note_start(number, failed=failed)
        if failed:
            raise EngineError("the engine died at its start")
        return cls(world)

    async def close(self, *, gently: bool) -> None:
        self.ended.cancel()

    # -- the wire ------------------------------------------------------------------------------------------------

    def send(self, message: Any) -> None:
        """Of both ends: commands of the client, and reports of the loop."""
        if isinstance(message, News):
            self._reports.append(message)
            return
        earliest = self._commands[-1][0] if self._commands else 0.0
        self._commands.append((max(earliest, self._world.clock() + self._world.delay()), message))
        self._arrived.set()

    def receive(self, seconds: float | None) -> list[Command]:
        come = []
        while self._commands and self._commands[0][0] <= self._world.clock():
            come.append(self._commands.popleft()[1])
        return come

    # -- the process ---------------------------------------------------------------------------------------------

    async def _run(self) -> str:
        """Work until the end; returns what it was, in words."""
        world = self._world
        while True:
            if self._loop.core.scheduler.num_unfinished == 0:
                self._arrived.clear()
                if not self._commands:
                    await self._arrived.wait()
                await asyncio.sleep(max(0.0, self._commands[0][0] - world.clock()))
            await asyncio.sleep(world.delay())
            chance = world.random.random()
            if chance < world.mishaps.hang:
                while not self.hangs():  # noqa: ASYNC110 (its clock changes it)
                    await asyncio.sleep(0.1)
                world.num_deaths += 1
                return "hangs"
            dies = chance < world.mishaps.hang + world.mishaps.death
            try:
                self._loop.turn()
            except Death:
                dies = True
            kept = world.random.randint(0, len(self._reports)) if dies else len(self._reports)
            reports, self._reports = self._reports[:kept], []
            await asyncio.sleep(world.delay())
            for report in reports:
                world.random.shuffle(report.outputs)
                self.take(report)
            if dies:
                world.num_deaths += 1
                return "died"

    def _fail(self, step: SchedulerOutput) -> None:
        for share in step.scheduled:
            name = share.request_id
            sequence = self._executor.sequences[share.row]
            num_output_tokens = len(sequence.token_ids) - sequence.num_prompt_tokens
            if num_output_tokens >= self._world.mishaps.poison.get(name, 1000):
                raise Death
            if name in self._world.mishaps.faulty:
                raise InjectedError(name)


# -- who asks --------------------------------------------------------------------------------------------------------


@dataclass
class Asked:
    """A request, and what its client was told of it.

    Attributes:
        begun_at_death: deaths of engines before it was accepted.
        deadline: until which it has time.
        ended: when it ended with an error.
    """

    request: EngineRequest
    begun_at_death: int
    deadline: float = inf
    ended: float = inf
    outputs: list[RequestOutput] = field(default_factory=list)
    error: ShoalError | None = None
    has_left: bool = False

    def check(self, world: World) -> None:
        """The law, for one request."""
        request, params = self.request, self.request.params
        expected = generate(CHOOSE, request.request_id, request.prompt_token_ids, params)
        told = [token_id for output in self.outputs for token_id in output.token_ids]
        assert told == expected[: len(told)], "other tokens than those of an undisturbed run"
        if params.num_logprobs is not None:
            scored = [(-one.logprob, one.rank) for output in self.outputs for one in output.logprobs or ()]
            start = len(request.prompt_token_ids)
            assert scored == [(token_id, start + place) for place, token_id in enumerate(told)]
        finished = [output.finish_reason for output in self.outputs if output.finish_reason is not None]
        if self.error is not None:
            assert len(finished) <= 1
            assert world.excuses(self), f"an error without a cause: {self.error!r}"
        elif not self.has_left:
            assert len(finished) == 1, "a request that was accepted ends exactly once"
            assert told == expected
            is_stopped = bool(told) and told[-1] in params.stop_token_ids
            assert finished[0] is (FinishReason.STOP if is_stopped else FinishReason.LENGTH)
            if params.num_prompt_logprobs is not None:
                ranks = [one.rank for output in self.outputs for one in output.prompt_logprobs or ()]
                assert ranks == list(range(1, len(request.prompt_token_ids))), "each prompt token is scored once"


class World:
    """One history.

    Attributes:
        num_deaths: of engines so far.
        gave_up: whether so many starts failed, of all clients, that requests may have ended for it.
        asked: all requests that were accepted.
    """

    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self.loop = VirtualLoop()
        self.clock = self.loop.time
        self.policy = random.choice(["fcfs", "sjf", "static"])
        self.drafts = random.random() < 0.5
        self.delay_seconds = random.choice([0.001, 0.05, 0.5])
        self.mishaps = Mishaps(
            death=random.choice([0.0, 0.02, 0.1, 0.3]),
            hang=random.choice([0.0, 0.0, 0.05]),
            failed_start=random.choice([0.0, 0.0, 0.2, 0.6]),
        )
        self.ends_early = random.random() < 0.15
        self.max_backlog = random.choice([16, 65536, 65536])
        self.num_deaths = self.num_refused = 0
        self.gave_up = self.is_over = False
        self.asked: list[Asked] = []
        self.clients = [self._client(number) for number in range(random.choice([1, 1, 2, 3]))]
        several = len(self.clients) > 1
        self.engine = Router(self.clients, METRICS, clock=self.clock) if several else self.clients[0]
        self._num_failed_starts = [0] * len(self.clients)
        self.streams = StreamStore(GRACE_SECONDS)
        max_queue_seconds = random.choice([inf, 1.0])
        for client in self.clients:
            client.admission = Admission(max_queue_seconds)

    def _client(self, number: int) -> EngineClient:
        return EngineClient(str(number), METRICS, hang_seconds=HANG_SECONDS, clock=self.clock)

    def note_start(self, number: int, *, failed: bool) -> None:
        """An engine of the client of this number has started, or has failed to."""
        self._num_failed_starts[number] = self._num_failed_starts[number] + 1 if failed else 0
        self.gave_up |= min(self._num_failed_starts) >= MAX_FAILED_STARTS

    def delay(self) -> float:
        return self.random.uniform(0.0, self.delay_seconds)

    def draft(self, request_id: str, context: list[int]) -> list[int]:
        """The next token, or another one."""
        right = CHOOSE(request_id, context)
        return [right if digest(context, 1) % 3 else (right + 1) % VOCAB_SIZE]

    def excuses(self, asked: Asked) -> bool:
        """Whether something that happened explains the error of a request."""
        error = asked.error
        if isinstance(error, SlowClientError):
            return self.max_backlog < 65536
        if isinstance(error, EngineUnavailableError):
            return self.is_over
        if isinstance(error, RequestTimeoutError):
            return asked.deadline <= asked.ended
        assert isinstance(error, EngineError)
        if "no engine could be started" in error.message:
            return self.gave_up
        if "the engine failed on this request" in error.message:
            return bool(self.mishaps.faulty)
        return self.num_deaths - asked.begun_at_death > MAX_DEATHS

    # -- its course ----------------------------------------------------------------------------------------------

    def play(self) -> None:
        """Raises AssertionError if the law is broken."""
        asyncio.set_event_loop(self.loop)
        try:
            with self._replacing():
                self.loop.run_until_complete(self._play())
        finally:
            asyncio.set_event_loop(None)
            self.loop.close()

    @contextmanager
    def _replacing(self) -> Iterator[None]:
        engines = mock.Mock(start=lambda settings: SimulatedEngine.start(self, int(settings.model)))
        with (
            mock.patch.object(supervisor_module, "EngineProcess", engines),
            mock.patch.object(Submission, "max_backlog", self.max_backlog),
        ):
            yield

    async def _play(self) -> None:
        standby = self.random.random() < 0.3
        settings = [_settings(number, standby=standby) for number in range(len(self.clients))]
        supervisors = list(map(EngineSupervisor, settings, self.clients))
        try:
            await asyncio.gather(*(supervisor.start() for supervisor in supervisors))
        except EngineError:
            await self._stop(supervisors)
            return  # the first start failed, and so did the server's
        clients = [asyncio.create_task(self._be_client(number)) for number in range(self.random.randint(1, 5))]
        if self.ends_early:
            await asyncio.sleep(self.random.uniform(0.0, 10.0))
            self.is_over = True
            await self.engine.drain(self.random.choice([0.0, 3.0]))
            await self._stop(supervisors)
        await asyncio.gather(*clients)
        assert self.engine.num_unfinished == 0
        await self._stop(supervisors)
        for asked in self.asked:
            asked.check(self)

    async def _stop(self, supervisors: Iterable[EngineSupervisor]) -> None:
        await asyncio.gather(*(supervisor.stop() for supervisor in supervisors))

    async def _be_client(self, number: int) -> None:
        """Ask for something, and read what comes: at once or slowly, to the end or not."""
        random = self.random
        await asyncio.sleep(random.uniform(0.0, 5.0))
        requests = [self._request(f"{number}-{index}") for index in range(random.randint(1, 3))]
        timeout = random.choice([inf] * 6 + [random.uniform(0.1, 20.0)])
        try:
            submission = self.engine.submit(requests, timeout)
        except (QueueFullError, EngineUnavailableError):
            self.num_refused += 1
            return
        deadline = self.clock() + timeout
        own = {request.request_id: Asked(request, self.num_deaths, deadline) for request in requests}
        self.asked += own.values()
        pause = random.choice([0.0, 0.0, 0.0, 2.0])
        patience = random.choice([1000, 1000, 1000, random.randint(1, 4)])  # news after which it leaves
        try:
            if random.random() < 0.3:
                await self._come_back(str(number), submission, own, pause)
            else:
                async with aclosing(self._news(submission)) as news:
                    await self._read(news, own, pause, patience)
        except ShoalError as error:
            for asked in own.values():
                asked.error, asked.ended = error, self.clock()

    async def _news(self, submission: Submission) -> Events:
        """What comes of requests until all have ended; each output is an event.  What is unfinished then is aborted."""
        unfinished = set(submission.journals)
        try:
            while unfinished:
                outputs = await submission.get()
                for output in outputs:
                    if output.finish_reason is not None:
                        unfinished.remove(output.request_id)  # once
                yield [msgspec.msgpack.encode(output) for output in outputs]
        finally:
            self.engine.abort(submission.journals)
            if submission.timer is not None:
                submission.timer.cancel()

    async def _read(self, news: Events, own: dict[str, Asked], pause: float, patience: int) -> int:
        """Read what comes, at most so many times; returns the number of events."""
        num_events = 0
        async for events in news:
            for event in events:
                output = msgspec.msgpack.decode(event, type=RequestOutput)
                own[output.request_id].outputs.append(output)
            num_events += len(events)
            patience -= 1
            if patience <= 0:
                for asked in own.values():
                    asked.has_left = True
                break
            await asyncio.sleep(pause)
        return num_events

    async def _come_back(self, name: str, submission: Submission, own: dict[str, Asked], pause: float) -> None:
        """Have the answer held; leave it again and again, and go on after the event that was read last."""
        answer = Answer(name, None, {}, is_stream=True)
        self.streams.begin(answer, poured(self._news(submission)))
        after, away = 0, 0.0
        try:
            while True:
                async with aclosing(self.streams.read(self.streams.find(name, None), after)) as events:
                    after += await self._read(events, own, pause, self.random.randint(1, 5))
                if answer.is_ended and after == answer.num_events:
                    break
                away = self.random.choice([0.0, 0.0, 1.0, 2.0 * GRACE_SECONDS])
                await asyncio.sleep(away)
        except NotFoundError:
            assert away > GRACE_SECONDS, "a stream is held for the grace time"
            return
        if answer.error is not None:
            raise answer.error
        for asked in own.values():
            asked.has_left = False

    def _request(self, name: str) -> EngineRequest:
        random = self.random
        stem = [random.choice([1, 2])] * random.choice([0, 8])  # which others may have, too
        prompt = stem + [random.randrange(VOCAB_SIZE) for _ in range(random.randint(1, 8))]
        if random.random() < 0.03:
            self.mishaps.poison[name] = random.randint(0, 4)
        if random.random() < 0.03:
            self.mishaps.faulty.add(name)
        params = SamplingParams(
            max_tokens=random.randint(1, 12),
            seed=0,
            stop_token_ids=frozenset(random.choices(range(VOCAB_SIZE), k=random.choice([0, 3]))),
            num_logprobs=random.choice([None, 0]),
            num_prompt_logprobs=random.choice([None, None, 0]),
        )
        return EngineRequest(name, prompt, params)


@cache
def _settings(number: int, *, standby: bool) -> Settings:
    return resolve({"model": str(number), "engine": {"standby": standby}})


def play(num_histories: int, first_seed: int = 0) -> dict[str, int]:
    """Play histories, and count what happened in them.

    Raises:
        AssertionError: the law was broken; the seed is in a note of the error.
    """
    counts = dict.fromkeys(("histories", "requests", "deaths", "errors", "refused"), 0)
    logging.disable(logging.CRITICAL)
    try:
        for seed in range(first_seed, first_seed + num_histories):
            world = World(seed)
            try:
                world.play()
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise
            counts["histories"] += 1
            counts["requests"] += len(world.asked)
            counts["deaths"] += world.num_deaths
            counts["errors"] += sum(asked.error is not None for asked in world.asked)
            counts["refused"] += world.num_refused
    finally:
        logging.disable(logging.NOTSET)
    return counts


if __name__ == "__main__":
    num_histories, first_seed = (int(word) for word in (sys.argv[1:] + ["1000", "0"][len(sys.argv) - 1 :]))
    began, counts = time.perf_counter(), Counter[str]()
    parts = [(min(250, num_histories - done), first_seed + done) for done in range(0, num_histories, 250)]
    with Pool() as pool:
        for part in pool.starmap(play, parts, chunksize=1):
            counts.update(part)
    print(dict(counts), f"{num_histories / (time.perf_counter() - began):.0f} histories/s")
