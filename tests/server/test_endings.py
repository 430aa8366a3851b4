"""Requests with `end_after` end with exactly that token, in every schedule, and the scheduler does not know it."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from shoal.scheduler.invariants import check_invariants
from shoal.scheduler.output import FinishReason, SamplingParams, SchedulerOutput
from shoal.scheduler.policies import POLICIES
from shoal.scheduler.request import Request
from shoal.server.engine.journal import Journal
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.messages import Abort, Command, EngineRequest, News, Report, Submit
from tests.examples import examples
from tests.fakes import Harness, InjectedError, generate, hashed, params

CHOOSE = hashed(50)
STOP = 99  # which the model never chooses itself


class FakeWire:
    """Gives all commands at once and gathers the news, by request id."""

    def __init__(self, harness: Harness, commands: list[Command]) -> None:
        self.harness = harness
        self.to_come = commands
        self.token_ids: dict[str, list[int]] = {}
        self.finish_reasons: dict[str, FinishReason] = {}

    def send(self, report: Report) -> None:
        assert isinstance(report, News)
        for output in report.outputs:
            assert output.request_id not in self.finish_reasons, "news after the end"
            self.token_ids.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason:
                self.finish_reasons[output.request_id] = output.finish_reason

    def receive(self, seconds: float | None) -> list[Command]:
        self.harness.now += 1 + (seconds or 0)
        commands, self.to_come = self.to_come, []
        return commands


def draft(request_id: str, context: list[int]) -> list[int]:
    """Draft two right tokens and a wrong one, so that a step gives up to three tokens."""
    first = CHOOSE(request_id, context)
    second = CHOOSE(request_id, [*context, first])
    return [first, second, 49 - CHOOSE(request_id, [*context, first, second])]


def request(name: str, prompt: list[int], max_tokens: int, end_after: int | None) -> EngineRequest:
    resolved = SamplingParams(max_tokens=max_tokens, min_tokens=max_tokens, seed=0, stop_token_ids=frozenset({STOP}))
    return EngineRequest(name, prompt, resolved, end_after=end_after)


def text(asked: EngineRequest) -> list[int]:
    """What the request must get."""
    alone = generate(CHOOSE, asked.request_id, asked.prompt_token_ids, params(asked.params.max_tokens))
    return alone if asked.end_after is None else [*alone[: asked.end_after - 1], STOP]


def run(harness: Harness, commands: list[Command]) -> FakeWire:
    """Turn the loop until each request has its answer and the engine has forgotten it."""
    sockets = FakeWire(harness, commands)
    loop = EngineLoop(harness.engine, sockets)
    loop.turn()
    while harness.scheduler.num_unfinished:
        loop.turn()
        check_invariants(harness.scheduler)
    loop.turn()
    assert not loop._endings._ends and not loop._endings._deaths, "an end that was reached is still expected"
    return sockets


@settings(max_examples=examples(200))
@given(
    asked=st.lists(
        st.tuples(
            st.lists(st.sampled_from([1, 2]), min_size=1, max_size=14),
            st.integers(1, 14),
            st.none() | st.integers(1, 14),
        ),
        min_size=1,
        max_size=6,
    ),
    policy=st.sampled_from(sorted(POLICIES)),
    num_blocks=st.integers(7, 16),
    speculates=st.booleans(),
    fails=st.sets(st.integers(0, 20)),
)
def test_they_end_exactly(
    asked: list[tuple[list[int], int, int | None]],
    policy: str,
    num_blocks: int,
    speculates: bool,
    fails: set[int],
) -> None:
    """Under each policy, with few blocks, speculation, and steps that fail and are done one by one."""
    submitted = [
        request(f"r{index}", prompt, max_tokens, end_after and min(end_after, max_tokens))
        for index, (prompt, max_tokens, end_after) in enumerate(asked)
    ]
    harness = Harness(
        CHOOSE,
        draft if speculates else None,
        policy=policy,
        num_blocks=num_blocks,
        max_num_seqs=4,
        max_chunk_tokens=5,
    )
    num_calls = 0

    def fail(output: SchedulerOutput) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls in fails and len(output.scheduled) > 1:
            raise InjectedError

    harness.executor.fail = fail
    sockets = run(harness, [Submit(submitted)])
    assert sockets.token_ids == {one.request_id: text(one) for one in submitted}
    assert sockets.finish_reasons == {
        one.request_id: FinishReason.STOP if one.end_after else FinishReason.LENGTH for one in submitted
    }


def test_a_preempted_request_ends_where_it_would_have() -> None:
    harness = Harness(CHOOSE, num_blocks=4, max_num_seqs=2)
    asked = [request("a", [1, 2, 3, 4, 5, 6], 9, 7), request("b", [7, 8, 9, 10, 11, 12, 13], 9, 8)]
    sockets = run(harness, [Submit(asked)])
    assert harness.scheduler.stats().num_preemptions > 0
    assert sockets.token_ids == {one.request_id: text(one) for one in asked}


@pytest.mark.parametrize("end_after", range(1, 9))
def test_an_end_among_accepted_tokens(end_after: int) -> None:
    """Three tokens come with a step; those after the end are dropped and are not found in the prefix cache."""
    harness = Harness(CHOOSE, draft)
    asked = request("a", [1, 2, 3], 12, end_after)
    assert run(harness, [Submit([asked])]).token_ids == {"a": text(asked)}
    longer = request("b", [1, 2, 3, *text(asked), 7, 7, 7, 7], 4, None)
    assert run(harness, [Submit([longer])]).token_ids == {"b": text(longer)}


def test_a_new_engine_goes_on_to_the_same_end() -> None:
    """What it is given is in the journal: the request, and the tokens so far."""
    asked = request("a", [1, 2, 3], 12, 9)
    journal = Journal(asked, "0", 0.0, output_token_ids=text(asked)[:4])
    resumed = EngineRequest(
        asked.request_id,
        asked.prompt_token_ids,
        asked.params,
        output_token_ids=journal.output_token_ids,
        end_after=journal.request.end_after,
    )
    sockets = run(Harness(CHOOSE), [Submit([resumed])])
    assert journal.output_token_ids + sockets.token_ids["a"] == text(asked)


class Killed(BaseException):
    """What a signal would do to the process."""


@pytest.mark.parametrize("speculates", [False, True])
@pytest.mark.parametrize("die_after", [0, 1, 5])
def test_an_engine_dies_after_so_many_tokens_and_the_next_one_lives(
    die_after: int, speculates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(pid: int, number: int) -> None:
        assert (pid, number) == (os.getpid(), signal.SIGKILL)
        raise Killed

    monkeypatch.setattr("shoal.server.engine.endings.os.kill", kill)
    asked, other = request("a", [1, 2, 3], 12, None), request("b", [4, 5], 3, None)
    journal = Journal(replace(asked, die_after=die_after), "0", 0.0)
    assert journal.resumed(0.0).die_after == die_after, "it may have waited for its first engine"
    harness = Harness(CHOOSE, draft if speculates else None)
    sockets = FakeWire(harness, [Submit([journal.resumed(0.0), other])])
    loop = EngineLoop(harness.engine, sockets)
    with pytest.raises(Killed):
        for _ in range(30):
            loop.turn()
    told = sockets.token_ids.get("a", [])
    assert told == text(asked)[: len(told)]
    assert len(told) == die_after or (speculates and die_after < len(told) < die_after + 3)

    journal.output_token_ids, journal.num_deaths = told, 1
    assert run(Harness(CHOOSE), [Submit([journal.resumed(1.0)])]).token_ids == {"a": text(asked)[len(told) :]}


def test_an_engine_outlives_a_request_that_ends_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.server.engine.endings.os.kill", lambda *_: pytest.fail("it dies"))
    asked = replace(request("a", [1, 2, 3], 4, None), die_after=4)
    assert run(Harness(CHOOSE), [Submit([asked])]).token_ids == {"a": text(asked)}


def test_aborted_and_refused_requests_are_forgotten() -> None:
    harness = Harness(CHOOSE, max_num_seqs=1)
    too_long = request("c", [1] * 200, 5, 3)
    commands: list[Command] = [
        Submit([request(name, [1], 9, 5) for name in "ab"]),
        Abort(["a", "b"]),
        Submit([too_long]),
    ]
    assert run(harness, commands).finish_reasons == {"c": FinishReason.ERROR}


def test_two_requests_that_differ_in_their_ends_look_the_same_to_the_scheduler() -> None:
    """Until one of them ends."""
    seen: list[list[object]] = []
    for end_after in (5, 9, None):
        harness = Harness(CHOOSE)
        loop = EngineLoop(harness.engine, FakeWire(harness, [Submit([request("a", [1, 2], 12, end_after)])]))
        for _ in range(4):
            loop.turn()
        (found,) = harness.scheduler.running.values()
        assert found.num_output_tokens == 4
        seen.append([getattr(found, name) for name in Request.__slots__])
    assert seen[0] == seen[1] == seen[2]
