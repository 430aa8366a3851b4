"""Several engines as one: engines that are played by hand die, hang, refuse and come back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import ContextLengthError, EngineError, QueueFullError
from shoal.scheduler.output import FinishReason, RequestOutput, SamplingParams, SchedulerStats, SchedulingParams
from shoal.server.engine.admission import Admission
from shoal.server.engine.client import MAX_DEATHS, EngineClient
from shoal.server.engine.messages import Abort, EngineRequest, ForgetPrefixes, News, Ready, Sendable, Submit
from shoal.server.engine.router import Router
from shoal.server.engine.submission import Submission
from shoal.server.errors import EngineUnavailableError, RequestTimeoutError
from shoal.server.metrics import Metrics

LIMITS = SchedulerConfig(
    num_blocks=64, block_size=4, max_model_len=100, max_num_seqs=2, max_num_batched_tokens=16, max_num_waiting=2
)


class Played:
    """An engine of a client that takes commands and says what the test has it say."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.commands: list[Sendable] = []

    def connect(self) -> None:
        self.client.connect(Ready(LIMITS, 1, 2, "by hand", None), self.commands.append)

    def say(self, *outputs: RequestOutput) -> None:
        self.client.take(News(list(outputs), SchedulerStats(0, 0, 0.0, 0, 0, 0)))

    def heard(self) -> list[Sendable]:
        commands, self.commands[:] = list(self.commands), []
        return commands

    def asked(self) -> list[EngineRequest]:
        """The requests that came since the last call."""
        return [one for command in self.heard() if isinstance(command, Submit) for one in command.requests]


class Several:
    """A router over engines by hand, all of them connected."""

    def __init__(self, count: int = 2) -> None:
        self.now = 0.0
        self.metrics = Metrics("fake")
        clients = [
            EngineClient(str(number), self.metrics, hang_seconds=5, clock=lambda: self.now) for number in range(count)
        ]
        self.router = Router(clients, self.metrics, clock=lambda: self.now)
        self.engines = [Played(client) for client in clients]
        for engine in self.engines:
            engine.connect()

    def submit(self, *prompts: Sequence[int], names: str = "abcdefgh", **options: object) -> Submission:
        params = SamplingParams(max_tokens=8, seed=1)
        return self.router.submit(
            [EngineRequest(name, prompt, params) for name, prompt in zip(names, prompts, strict=False)],
            **options,  # type: ignore[arg-type]
        )

    def where(self) -> list[list[str]]:
        """Ids of the requests that came to each engine since the last call."""
        return [[request.request_id for request in engine.asked()] for engine in self.engines]


def play(scene: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(280):
            await scene()

    asyncio.run(limited())


async def turns() -> None:
    """Let all that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_requests_of_one_call_are_shared_out() -> None:
    async def scene() -> None:
        several = Several()
        submission = several.submit([1], [2], [3], [4])
        assert several.where() == [["a", "c"], ["b", "d"]]
        assert [journal.engine for journal in submission.journals.values()] == ["0", "1", "0", "1"]
        assert [journal.request.request_id for journal in several.router.journals()] == ["a", "c", "b", "d"]
        several.engines[1].say(RequestOutput("b", [7], FinishReason.STOP))
        several.engines[0].say(RequestOutput("a", [8]))
        assert [output.request_id for output in await submission.get()] == ["b", "a"]
        assert several.router.num_unfinished == 3

    play(scene)


def test_a_prompt_goes_to_the_engine_that_has_its_prefix() -> None:
    async def scene() -> None:
        several = Several()
        several.submit([1] * 9, names="a")
        several.submit([2] * 9, names="b")
        assert several.where() == [["a"], ["b"]]
        several.submit([2] * 9 + [3], names="c")
        several.submit([1] * 9 + [4], names="d")
        assert several.where() == [["d"], ["c"]]
        several.router.forget_prefixes()
        assert all(ForgetPrefixes() in engine.heard() for engine in several.engines)

    play(scene)


@pytest.mark.parametrize(
    ("params", "salt"),
    [
        (SamplingParams(max_tokens=8, seed=1), "another salt"),
        (SamplingParams(max_tokens=8, seed=1, num_prompt_logprobs=0), ""),
    ],
)
def test_who_may_not_use_a_prefix_is_not_drawn_to_it(params: SamplingParams, salt: str) -> None:
    async def scene() -> None:
        several = Several()
        several.submit([1] * 9, names="a")
        request = EngineRequest("b", [1] * 9, params, scheduling=SchedulingParams(cache_salt=salt))
        several.router.submit([request])
        assert several.where() == [["a"], ["b"]]

    play(scene)


def test_the_requests_of_an_engine_that_died_go_on_at_once_at_another() -> None:
    async def scene() -> None:
        several = Several()
        submission = several.submit([1], [2], [3])
        first, second = several.engines
        first.say(RequestOutput("a", [7]))
        several.where()
        several.now = 2.0
        first.client.lose()
        assert [(one.request_id, one.output_token_ids, one.age) for one in second.asked()] == [
            ("a", [7], 2.0),
            ("c", [], 2.0),
        ]
        first.say(RequestOutput("a", [8]))  # what a dead engine said is not taken
        second.say(RequestOutput("a", [9], FinishReason.LENGTH))
        told = [token_id for output in await submission.get() for token_id in output.token_ids]
        assert told == [7, 9]
        assert [journal.engine for journal in several.router.journals()] == ["1", "1"]
        assert (
            several.metrics.registry.get_sample_value(
                "shoal:requests_resumed_total", {"model_name": "fake", "engine": "1"}
            )
            == 2
        )

    play(scene)


def test_with_no_engine_left_requests_wait_for_the_first_that_comes() -> None:
    async def scene() -> None:
        several = Several()
        several.submit([1], [2])
        for engine in several.engines:
            engine.client.lose()
        with pytest.raises(EngineUnavailableError):
            several.router.check_health()
        several.where()
        several.submit([3], names="c")
        assert several.where() == [[], []]
        several.engines[1].connect()
        several.router.check_health()
        assert list(map(sorted, several.where())) == [[], ["a", "b", "c"]]

    play(scene)


def test_requests_end_only_when_the_last_engine_is_given_up() -> None:
    async def scene() -> None:
        several = Several()
        submission = several.submit([1], [2])
        first, second = (engine.client for engine in several.engines)
        first.lose()
        second.lose()
        first.give_up(EngineError("no engine could be started"))
        assert several.router.num_unfinished == 2
        several.router.check_room()
        second.give_up(EngineError("no engine could be started"))
        assert several.router.num_unfinished == 0
        with pytest.raises(EngineError, match="no engine could be started"):
            await submission.get()
        with pytest.raises(EngineUnavailableError):
            several.submit([3], names="c")

    play(scene)


def test_what_may_kill_engines_is_tried_alone_and_the_others_go_elsewhere() -> None:
    async def scene() -> None:
        several = Several()
        submission = several.submit([1])
        for number in range(MAX_DEATHS):
            several.engines[number % 2].client.lose()
            several.engines[number % 2].connect()
        owner = next(engine for engine in several.engines if engine.client.num_unfinished)
        other = next(engine for engine in several.engines if engine is not owner)
        several.where()
        several.submit([2], [3], names="bc")
        assert (owner.asked(), [one.request_id for one in other.asked()]) == ([], ["b", "c"])
        owner.client.lose()
        with pytest.raises(EngineError, match=f"died each of {MAX_DEATHS + 1} times"):
            await submission.get()

    play(scene)


def test_a_suspect_whose_engine_never_comes_back_is_tried_elsewhere() -> None:
    """Engines are scaled away one after the other, and a request comes to each of them before it goes."""

    async def scene() -> None:
        several = Several(MAX_DEATHS + 1)
        *_, last = several.engines
        submission = several.submit([1, 2, 3])
        for _ in range(MAX_DEATHS):
            owner = next(one for one in several.engines if one.client.num_unfinished)
            if owner is last:
                several.engines.remove(last)
                several.engines.insert(0, last)
                *_, last = several.engines
            owner.client.lose()
            owner.client.retire()
        assert last.client.num_unfinished == 1
        last.say(RequestOutput("a", [5], FinishReason.STOP))
        await turns()
        assert [output.token_ids for output in submission.take()] == [[5]]

    play(scene)


def test_what_waited_for_a_trial_goes_on_when_it_ends() -> None:
    """Of two engines one is gone for good, while what may kill engines is tried at the other one."""

    async def scene() -> None:
        several = Several(2)
        first, second = several.engines
        suspect = several.submit([1, 2, 3])
        for _ in range(MAX_DEATHS):
            owner = first if first.client.num_unfinished else second
            owner.client.lose()
            owner.connect()
        owner, other = (first, second) if first.client.num_unfinished else (second, first)
        assert not owner.client.is_open
        held = several.submit([4, 5, 6], names="b")
        assert other.client.num_unfinished == 1
        other.client.lose()
        other.client.retire()
        owner.say(RequestOutput("a", [5], FinishReason.STOP))
        assert owner.client.num_unfinished == 1
        owner.say(RequestOutput("b", [6], FinishReason.STOP))
        await turns()
        assert [[output.token_ids for output in one.take()] for one in (suspect, held)] == [[[5]], [[6]]]

    play(scene)


def test_what_moves_while_it_is_aborted_is_aborted() -> None:
    """The end of a trial has what waits for another engine come to one that has aborted already."""

    async def scene() -> None:
        several = Several()
        first, second = several.engines
        several.submit([1, 2, 3])
        for owner in (first, second, first):
            owner.client.lose()
            owner.connect()
        assert not first.client.is_open
        several.submit([4, 5, 6], names="b")
        second.client.lose()
        assert [engine.client.num_unfinished for engine in several.engines] == [1, 1]
        several.router.abort(["a", "b"])
        assert several.router.num_unfinished == 0

    play(scene)


def test_all_that_two_full_engines_have_accepted_goes_on_in_one() -> None:
    async def scene() -> None:
        several = Several()
        first, second = several.engines
        several.submit(*[[1]] * 4)
        several.submit(*[[1]] * 4, names="ijkl")
        assert all(request.is_bounded for engine in several.engines for request in engine.asked())
        first.client.lose()
        moved = second.asked()
        assert len(moved) == 4
        assert not any(request.is_bounded for request in moved)
        second.client.lose()
        second.connect()
        again = second.asked()
        assert len(again) == 8
        assert not any(request.is_bounded for request in again)

    play(scene)


def test_a_full_engine_is_passed_over_and_all_are_full_in_the_end() -> None:
    async def scene() -> None:
        several = Several()
        several.submit(*[[1] * 9] * 4)
        several.submit(*[[1] * 9] * 4, names="ijkl")
        assert [engine.client.num_unfinished for engine in several.engines] == [4, 4]
        with pytest.raises(QueueFullError, match="max_num_waiting"):
            several.submit([1] * 9, names="m")
        with pytest.raises(QueueFullError):
            several.router.check_room()
        several.router.abort(["a", "i"])
        several.router.check_room()
        several.submit([1] * 9, names="n")
        assert several.router.num_unfinished == 7

    play(scene)


def test_all_requests_of_a_call_are_taken_or_none() -> None:
    async def scene() -> None:
        several = Several()
        with pytest.raises(QueueFullError):
            several.submit(*[[1]] * 9, names="abcdefghi")
        with pytest.raises(ContextLengthError):
            several.submit([1], [2] * 200)
        assert several.where() == [[], []]

    play(scene)


def test_the_time_of_a_call_runs_out_at_all_engines() -> None:
    async def scene() -> None:
        several = Several()
        submission = several.submit([1], [2], timeout=0.01)
        with pytest.raises(RequestTimeoutError):
            await submission.get()
        assert several.router.num_unfinished == 0
        assert all(any(isinstance(command, Abort) for command in engine.heard()) for engine in several.engines)

    play(scene)


def test_bounds_by_time_are_each_engines_own() -> None:
    async def scene() -> None:
        several = Several()
        for engine in several.engines:
            engine.client.admission = Admission(max_queue_tokens=10)
        several.submit([1] * 9, [2] * 9)
        with pytest.raises(QueueFullError) as refusal:
            several.submit([3] * 9, names="c")
        assert refusal.value.param == "max_queue_tokens"

    play(scene)


def test_a_drain_waits_for_what_moves_to_an_engine_that_had_nothing_left() -> None:
    async def scene() -> None:
        several = Several()
        submission = several.submit([1])
        draining = asyncio.create_task(several.router.drain(100))
        await turns()
        with pytest.raises(EngineUnavailableError, match="shutting down"):
            several.submit([2], names="b")
        several.engines[0].client.lose()
        assert several.where()[1] == ["a"]
        await turns()
        assert not draining.done()
        several.engines[1].say(RequestOutput("a", [7], FinishReason.LENGTH))
        await draining
        assert (await submission.get())[0].token_ids == [7]

    play(scene)


def test_what_is_unfinished_at_the_end_of_a_drain_ends() -> None:
    async def scene() -> None:
        several = Several()
        submission = several.submit([1], [2])
        await several.router.drain(0.01)
        with pytest.raises(EngineUnavailableError):
            await submission.get()
        several.router.close()
        assert several.router.num_unfinished == 0

    play(scene)
