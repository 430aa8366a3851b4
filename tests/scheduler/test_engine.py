"""Failures at every point of a step: the request at fault ends with an error, and all others go on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shoal.scheduler.output import FinishReason, SchedulerOutput, StepResult
from tests.fakes import Harness, InjectedError, Share, generate, hashed, params

PROMPTS = {"a": [1, 2, 3], "b": [4, 5, 6, 7, 8, 9], "c": [10]}


def alone(request_id: str) -> list[int]:
    return generate(hashed(50), request_id, PROMPTS[request_id], params(4))


def add_all(harness: Harness) -> None:
    for request_id, prompt in PROMPTS.items():
        harness.add(request_id, prompt, max_tokens=4)


def fails_for(request_id: str, when: Callable[[Share], bool] = lambda _: True) -> Callable[[SchedulerOutput], None]:
    """Fails each step in which this request has a share of which `when` is true."""

    def fail(output: SchedulerOutput) -> None:
        for share in output.scheduled:
            seen = Share(share.request_id, share.num_computed_tokens, share.num_scheduled_tokens, ())
            if share.request_id == request_id and when(seen):
                raise InjectedError(f"{request_id} at {share.num_computed_tokens}")

    return fail


def test_a_step_that_always_fails_ends_all_requests_with_its_message() -> None:
    harness = Harness()

    def fail(output: SchedulerOutput) -> None:
        if output.scheduled:
            raise InjectedError("out of memory")

    harness.executor.fail = fail
    add_all(harness)
    harness.drain()
    assert set(harness.finish_reasons.values()) == {FinishReason.ERROR}
    assert harness.errors == dict.fromkeys(PROMPTS, "InjectedError: out of memory")
    assert len(harness.chunks) == 1 + len(PROMPTS), "the whole step, and then each share alone"


@pytest.mark.parametrize("culprit", PROMPTS)
@pytest.mark.parametrize(
    "when",
    [
        lambda share: share.start == 0,
        lambda share: share.num_tokens == 1 and share.start == len(PROMPTS[share.request_id]) + 1,
        lambda share: share.start + share.num_tokens == len(PROMPTS[share.request_id]) + 3,
    ],
    ids=["first prefill", "middle of the decode", "last token"],
)
@pytest.mark.parametrize("chunk", [2, 100])
def test_only_the_request_at_fault_ends_with_an_error(culprit: str, when: Callable[[Share], bool], chunk: int) -> None:
    harness = Harness(max_chunk_tokens=chunk)
    harness.executor.fail = fails_for(culprit, when)
    add_all(harness)
    harness.drain()
    assert harness.errors.keys() == {culprit}
    assert harness.errors[culprit].startswith(f"InjectedError: {culprit} at ")
    for request_id in PROMPTS.keys() - {culprit}:
        assert harness.finish_reasons[request_id] is FinishReason.LENGTH
        assert harness.token_ids[request_id] == alone(request_id)
    assert harness.token_ids[culprit] == alone(culprit)[: len(harness.token_ids[culprit])]


def test_the_blocks_of_a_failed_request_are_free_at_once_and_their_content_is_not_found() -> None:
    harness = Harness()
    harness.executor.fail = fails_for("b")
    harness.add("b", PROMPTS["b"])
    harness.step()
    assert harness.free_blocks == harness.config.num_blocks
    harness.executor.fail = lambda _: None
    harness.add("again", PROMPTS["b"])
    harness.drain()
    assert harness.chunks[-4] == [("again", 0, 6)]
    assert harness.token_ids["again"] == alone("b")


@pytest.mark.parametrize("failing_call", range(6))
def test_a_passing_failure_reaches_no_client(failing_call: int) -> None:
    """The first call fails, its repetition one by one does not."""
    harness = Harness()
    calls = iter(range(1000))

    def fail(output: SchedulerOutput) -> None:
        if next(calls) == failing_call and output.scheduled:
            raise InjectedError("once")

    harness.executor.fail = fail
    add_all(harness)
    harness.drain()
    assert harness.errors == {}
    assert harness.token_ids == {request_id: alone(request_id) for request_id in PROMPTS}


def test_a_failing_step_one_by_one_keeps_the_order_and_repeats_once_what_was_released() -> None:
    harness = Harness(max_num_seqs=2)
    harness.add("z", [1], max_tokens=1)
    harness.step()
    add_all(harness)
    harness.executor.fail = fails_for("b")
    harness.step()
    assert harness.chunks[1:] == [[("a", 0, 3), ("b", 0, 6)], [("a", 0, 3)], [("b", 0, 6)]]
    assert harness.executor.released[1:] == [[0], [0], []]
    harness.drain()
    assert harness.errors.keys() == {"b"}


@pytest.mark.parametrize("fails", [False, True])
def test_a_row_that_is_freed_during_a_step_goes_to_the_next_request(*, fails: bool) -> None:
    """ "a" is aborted after it was scheduled; the step is computed nevertheless, or fails and is repeated."""
    harness = Harness(max_num_seqs=3)
    add_all(harness)
    harness.step()
    assert [request.row for request in harness.scheduler.running.values()] == [0, 1, 2]

    def abort(_: SchedulerOutput) -> None:
        harness.executor.fail = lambda _: None
        harness.abort("a")
        if fails:
            raise InjectedError("once")

    harness.executor.fail = abort
    harness.step()
    harness.add("d", PROMPTS["a"])
    harness.step()
    assert [request.row for request in harness.scheduler.running.values()] == [1, 2, 0]
    assert harness.executor.sequences[0].request_id == "d"
    harness.drain()
    assert {request_id: harness.token_ids[request_id] for request_id in "bc"} == {"b": alone("b"), "c": alone("c")}
    assert harness.token_ids["d"] == alone("a")


def test_a_request_may_fail_alone() -> None:
    harness = Harness()
    harness.executor.error = lambda share: "Injected: not finite" if share.request_id == "b" else None
    add_all(harness)
    harness.step()
    assert harness.errors == {"b": "Injected: not finite"}
    assert harness.token_ids["b"] == []
    assert "b" not in harness.scheduler.running
    harness.drain()
    assert len(harness.chunks) == 4, "no step was repeated"
    assert {request_id: harness.token_ids[request_id] for request_id in "ac"} == {"a": alone("a"), "c": alone("c")}


def test_a_request_may_fail_alone_in_the_middle_of_its_prompt() -> None:
    harness = Harness(max_chunk_tokens=2)
    harness.executor.error = lambda share: "Injected" if share.num_computed_tokens == 2 else None
    harness.add("b", PROMPTS["b"])
    harness.drain()
    assert harness.chunks == [[("b", 0, 2)], [("b", 2, 2)]]
    assert harness.errors == {"b": "Injected"}


def test_what_is_not_an_exception_of_the_step_is_not_caught() -> None:
    class Interrupted:
        def execute(self, output: SchedulerOutput) -> StepResult:
            raise KeyboardInterrupt

    harness = Harness(executor=Interrupted())
    harness.add("a", [1])
    with pytest.raises(KeyboardInterrupt):
        harness.step()


def test_the_engine_reads_the_clock_that_it_was_given() -> None:
    harness = Harness()
    harness.now = 7.5
    request = harness.add("a", [1], max_tokens=1)
    harness.now = 9.0
    harness.drain()
    assert request.scheduled_time == 9.0
    assert harness.first_news["a"].queue_time == 1.5
