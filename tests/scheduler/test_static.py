"""The static baselines: the requests of each batch, when it starts, and padding rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shoal.scheduler.invariants import check_invariants
from shoal.scheduler.output import FinishReason, SchedulerOutput
from shoal.scheduler.policies.static import Static
from shoal.scheduler.request import RequestStatus
from tests.fakes import Draft, Harness, InjectedError, generate, hashed, params

TIMEOUT = 5.0
KNOBS = Static.Knobs(static_timeout_seconds=TIMEOUT)


def static(max_num_seqs: int = 3, *, draft: Draft | None = None, **limits: int) -> Harness:
    return Harness(
        draft=draft,
        policy="static",
        knobs=KNOBS,
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=False,
        **limits,
    )


def unpadded(max_num_seqs: int = 3, **limits: int) -> Harness:
    return Harness(policy="static-nopad", knobs=KNOBS, max_num_seqs=max_num_seqs, enable_prefix_caching=False, **limits)


def add_all(harness: Harness, *lengths: int) -> None:
    """Requests "a", "b", ... with outputs of these lengths."""
    for request_id, max_tokens in zip("abcdefgh", lengths, strict=False):
        harness.add(request_id, [ord(request_id), 1], max_tokens)


def padding(harness: Harness) -> list[str]:
    return list(harness.scheduler.padding)


def check_tokens(harness: Harness) -> None:
    for request_id, reason in harness.finish_reasons.items():
        if reason is FinishReason.LENGTH:
            tokens = harness.token_ids[request_id]
            assert tokens == generate(hashed(50), request_id, [ord(request_id), 1], params(len(tokens)))


# -- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [static, unpadded])
def test_no_request_joins_until_the_whole_batch_has_finished(make: Callable[[int], Harness]) -> None:
    harness = make(3)
    add_all(harness, 1, 4, 2, 1, 3, 1)
    harness.drain()
    joined = [[name for name, start, _ in step if start == 0] for step in harness.chunks]
    assert joined == [["a", "b", "c"], [], [], [], ["d", "e", "f"], [], []]
    check_tokens(harness)


def test_rows_end_with_their_requests_if_they_are_not_padded() -> None:
    harness = unpadded(3)
    add_all(harness, 1, 3, 2)
    harness.drain()
    assert harness.chunks == [
        [("a", 0, 2), ("b", 0, 2), ("c", 0, 2)],
        [("b", 2, 1), ("c", 2, 1)],
        [("b", 3, 1)],
    ]


def test_all_rows_are_computed_until_the_longest_ends() -> None:
    """ "a" ends in the first step, "c" in the second: the last position of each is computed again and again."""
    harness = static(3)
    add_all(harness, 1, 4, 2)
    harness.step()
    assert harness.finish_reasons == {"a": FinishReason.LENGTH}, "its client has its answer at once"
    assert (harness.scheduler.num_unfinished, padding(harness)) == (2, ["a"])
    blocks = harness.free_blocks
    harness.drain()
    assert harness.chunks == [
        [("a", 0, 2), ("b", 0, 2), ("c", 0, 2)],
        [("a", 1, 1), ("b", 2, 1), ("c", 2, 1)],
        [("a", 1, 1), ("c", 2, 1), ("b", 3, 1)],
        [("a", 1, 1), ("c", 2, 1), ("b", 4, 1)],
    ]
    assert harness.executor.released[:4] == [[], [], [], []]
    assert sorted(harness.executor.released[4]) == [0, 1, 2]
    assert blocks == harness.config.num_blocks - 3, "padding takes no further blocks"
    check_tokens(harness)


def test_the_last_to_finish_takes_its_batch_along_at_once() -> None:
    """Blocks are free without another step, because an engine without requests takes no step."""
    harness = static(2)
    add_all(harness, 1, 2)
    harness.step()
    harness.step()
    assert not harness.scheduler.num_unfinished
    assert harness.free_blocks == harness.config.num_blocks
    harness.drain()


def test_a_batch_starts_when_it_is_full_or_at_the_timeout() -> None:
    harness = static(2)
    harness.add("a", [1], max_tokens=1)
    for _ in range(3):
        harness.step()
    harness.add("b", [2], max_tokens=1)
    harness.step()
    assert harness.chunks == [[("a", 0, 1), ("b", 0, 1)]], "full"
    harness.now = 100.0
    harness.add("c", [3], max_tokens=1)
    assert harness.scheduler.wake_time(harness.now) == 100.0 + TIMEOUT
    for _ in range(5):
        assert harness.step() == []
    assert len(harness.chunks) == 1
    harness.step()
    assert harness.chunks[1:] == [[("c", 0, 1)]], "at the timeout"
    harness.drain()


def test_the_timeout_counts_from_the_oldest_that_still_waits() -> None:
    harness = static(3)
    harness.add("a", [1])
    harness.now = 2.0
    harness.add("b", [2])
    assert harness.scheduler.wake_time(2.0) == TIMEOUT
    harness.abort("a")
    assert harness.scheduler.wake_time(2.0) == 2.0 + TIMEOUT
    harness.abort("b")
    assert harness.scheduler.wake_time(2.0) is None
    harness.drain()


def test_a_request_that_waited_during_a_batch_does_not_wait_again() -> None:
    harness = static(2)
    add_all(harness, 8, 1, 1)
    for _ in range(8):
        harness.step()
    assert harness.scheduler.wake_time(harness.now) == harness.now
    harness.step()
    assert harness.chunks[-1] == [("c", 0, 2)]
    harness.drain()


def test_members_whose_prompts_exceed_the_budget_join_over_several_steps() -> None:
    harness = static(2, max_num_batched_tokens=4)
    harness.add("a", [1] * 6, max_tokens=1)
    harness.add("b", [2] * 3, max_tokens=2)
    harness.add("c", [3], max_tokens=1)
    harness.drain()
    assert harness.chunks == [
        [("a", 0, 4)],
        [("a", 4, 2), ("b", 0, 2)],
        [("a", 5, 1), ("b", 2, 1)],
        [("a", 5, 1), ("b", 3, 1)],
        [("c", 0, 1)],
    ]


# -- padding rows ------------------------------------------------------------------------------------------------------


def test_padding_gives_way_first_and_is_no_preemption() -> None:
    """ "b" grows into the blocks of "a", which only pads."""
    harness = static(2, num_blocks=4, block_size=2, max_model_len=8)
    add_all(harness, 2, 6)
    harness.step()
    harness.step()
    assert padding(harness) == ["a"]
    for _ in range(3):
        harness.step()
    assert padding(harness) == []
    harness.drain()
    assert harness.chunks[2:] == [
        [("a", 2, 1), ("b", 3, 1)],
        [("b", 4, 1)],
        [("b", 5, 1)],
        [("b", 6, 1)],
    ]
    assert harness.executor.released[3] == [0]
    assert harness.scheduler.stats().num_preemptions == 0
    check_tokens(harness)


def test_a_preempted_member_comes_back_into_its_batch() -> None:
    harness = static(3, num_blocks=4, block_size=2, max_model_len=8)
    add_all(harness, 6, 6, 6, 1)
    members = list(harness.scheduler.waiting.values())[:3]
    while not all(harness.status(member) is RequestStatus.FINISHED for member in members):
        harness.step()
        assert "d" in harness.scheduler.waiting, "no request joins before the batch ends"
    assert harness.scheduler.stats().num_preemptions > 0
    harness.drain()
    check_tokens(harness)


def test_an_abort_frees_the_row_and_one_of_an_answered_request_is_no_news() -> None:
    harness = static(3)
    add_all(harness, 1, 4, 4)
    harness.step()
    assert harness.scheduler.abort("a") is None
    assert padding(harness) == ["a"], "its batch still computes its row"
    harness.abort("b")
    assert padding(harness) == ["a"], "an aborted request leaves no padding row"
    harness.abort("c")
    assert padding(harness) == [], "the batch has ended"
    assert harness.free_blocks == harness.config.num_blocks
    harness.drain()


def test_an_abort_during_the_step_of_a_padding_row() -> None:
    harness = static(2)
    add_all(harness, 1, 4)
    harness.step()
    output = harness.scheduler.schedule(harness.now)
    assert [(share.request_id, share.is_padding) for share in output.scheduled] == [("a", True), ("b", False)]
    result = harness.executor.execute(output)
    harness.abort("b")
    assert harness.scheduler.update(output, result, harness.now) == []
    check_invariants(harness.scheduler)
    harness.drain()


def test_a_padding_row_that_fails_is_dropped_silently() -> None:
    harness = static(2)
    add_all(harness, 1, 4)
    harness.step()

    def fail(output: SchedulerOutput) -> None:
        if any(share.is_padding for share in output.scheduled):
            raise InjectedError

    harness.executor.fail = fail
    harness.step()
    assert padding(harness) == []
    harness.drain()
    assert harness.chunks[1:4] == [[("a", 1, 1), ("b", 2, 1)], [("a", 1, 1)], [("b", 2, 1)]], "all, then one by one"
    assert set(harness.finish_reasons.values()) == {FinishReason.LENGTH}
    check_tokens(harness)


def test_the_request_at_fault_ends_and_the_padding_of_its_batch_with_it() -> None:
    harness = static(2)
    add_all(harness, 1, 4)
    harness.step()
    harness.executor.error = lambda share: "Injected"
    harness.step()
    assert harness.finish_reasons == {"a": FinishReason.LENGTH, "b": FinishReason.ERROR}
    assert harness.free_blocks == harness.config.num_blocks
    harness.drain()


def test_what_only_scored_its_prompt_is_padded_too() -> None:
    harness = static(2)
    add_all(harness, 0, 2)
    harness.drain()
    assert harness.chunks == [[("a", 0, 2), ("b", 0, 2)], [("a", 1, 1), ("b", 2, 1)]]


def test_padding_after_speculation() -> None:
    """The executor's fake checks that each padding row chooses what it chose before."""

    def draft(request_id: str, context: list[int]) -> list[int]:
        drafted: list[int] = []
        for _ in range(3):
            drafted.append(hashed(50)(request_id, context + drafted))
        return drafted

    harness = static(3, draft=draft)
    for request_id, max_tokens in (("a", 3), ("b", 12), ("c", 6)):
        prompt = [ord(request_id), 1]
        stop = generate(hashed(50), request_id, prompt, params(max_tokens))[-1]
        harness.add(request_id, prompt, 20, stop_token_ids=frozenset([stop]))
    harness.drain()
    assert any(name == "a" for step in harness.chunks[3:] for name, _, _ in step)
    assert set(harness.finish_reasons.values()) == {FinishReason.STOP}


def test_what_the_policy_holds_back_is_told_from_what_finds_no_room() -> None:
    harness = static(2)
    add_all(harness, 3, 3, 1)
    harness.step()
    stats = harness.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_deferred) == (2, 1, 1)
    full = Harness(max_num_seqs=2)
    add_all(full, 3, 3, 1)
    full.step()
    stats = full.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_deferred) == (2, 1, 0)
