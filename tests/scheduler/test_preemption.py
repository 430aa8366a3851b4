"""Which request gives way when blocks run out, and how it returns."""

from __future__ import annotations

from shoal.scheduler.output import FinishReason
from shoal.scheduler.request import RequestStatus
from tests.fakes import Harness, generate, hashed, params


def test_the_latest_arrival_gives_way_and_is_computed_again() -> None:
    """Four blocks of two: both requests start with two blocks, and neither can end with those."""
    harness = Harness(num_blocks=4, block_size=2, max_model_len=8, enable_prefix_caching=False)
    harness.add("a", [1, 2, 3], max_tokens=4)
    late = harness.add("b", [4, 5, 6], max_tokens=4)
    harness.step()
    harness.step()
    assert harness.status(late) is RequestStatus.RUNNING
    harness.step()
    assert harness.status(late) is RequestStatus.PREEMPTED
    assert (late.num_computed_tokens, late.block_ids, late.num_preemptions) == (0, [], 1)
    harness.drain()
    assert harness.chunks == [
        [("a", 0, 3), ("b", 0, 3)],
        [("a", 3, 1), ("b", 3, 1)],
        [("a", 4, 1)],
        [("a", 5, 1)],
        [("b", 0, 5)],
        [("b", 5, 1)],
    ]
    assert harness.executor.released[2] == [1]
    assert harness.scheduler.stats().num_preemptions == 1
    for request_id, prompt in (("a", [1, 2, 3]), ("b", [4, 5, 6])):
        assert harness.token_ids[request_id] == generate(hashed(50), request_id, prompt, params(4))


def test_a_preempted_request_finds_its_prefix_again() -> None:
    harness = Harness(num_blocks=6, block_size=2, max_model_len=12)
    harness.add("a", [1, 2, 3, 4, 5], max_tokens=3)
    late = harness.add("b", [6, 7, 8, 9, 10], max_tokens=3)
    harness.step()
    harness.step()
    harness.step()
    assert harness.status(late) is RequestStatus.PREEMPTED
    harness.drain()
    # "a" took the tail of what "b" had left; its head was still there.
    assert harness.chunks[-1] == [("b", 4, 3)]
    assert harness.token_ids["b"] == generate(hashed(50), "b", [6, 7, 8, 9, 10], params(3))
    assert harness.first_news["b"].num_cached_tokens == 0, "what a preemption finds again is no hit of the prompt"


def test_several_victims_come_back_in_the_order_of_arrival() -> None:
    harness = Harness(num_blocks=3, block_size=2, max_model_len=6, max_num_seqs=3, enable_prefix_caching=False)
    for request_id, token_id in (("a", 1), ("b", 2), ("c", 3)):
        harness.add(request_id, [token_id], max_tokens=5)
    harness.add("d", [4], max_tokens=1)
    for _ in range(5):
        harness.step()
    assert list(harness.scheduler.waiting) == ["b", "c", "d"]
    harness.step()
    assert [share[0] for share in harness.chunks[-1]] == ["b"], "no request overtakes"
    harness.drain()
    assert harness.scheduler.stats().num_preemptions == 2


def test_a_request_without_a_later_victim_is_preempted_itself() -> None:
    """The latest arrival needs a block that all earlier ones hold."""
    harness = Harness(num_blocks=3, block_size=4, max_model_len=12, enable_prefix_caching=False)
    harness.add("a", [1] * 5, max_tokens=3)
    late = harness.add("b", [2] * 4, max_tokens=3)
    harness.step()
    harness.step()
    assert harness.status(late) is RequestStatus.PREEMPTED
    assert harness.chunks[1] == [("a", 5, 1)]
    harness.drain()
    assert late.num_preemptions == 1


def test_no_request_is_admitted_in_a_step_that_preempts() -> None:
    harness = Harness(num_blocks=4, block_size=2, max_model_len=8, enable_prefix_caching=False)
    harness.add("a", [1, 2, 3], max_tokens=4)
    harness.add("b", [4, 5, 6], max_tokens=4)
    harness.step()
    harness.step()
    harness.add("c", [7], max_tokens=1)
    harness.step()
    assert harness.chunks[-1] == [("a", 4, 1)], "one block is free, but it would only be taken back"
    harness.drain()
    assert [[share[0] for share in step] for step in harness.chunks[3:]] == [["a"], ["b", "c"], ["b"]]


def test_abort_of_a_preempted_request() -> None:
    harness = Harness(num_blocks=4, block_size=2, max_model_len=8)
    harness.add("a", [1, 2, 3], max_tokens=4)
    late = harness.add("b", [4, 5, 6], max_tokens=4)
    for _ in range(3):
        harness.step()
    assert harness.status(late) is RequestStatus.PREEMPTED
    harness.abort("b")
    harness.drain()
    assert harness.finish_reasons["b"] is FinishReason.ABORT
    assert harness.token_ids["b"] == generate(hashed(50), "b", [4, 5, 6], params(4))[:2]


def test_a_half_computed_prompt_can_be_preempted() -> None:
    harness = Harness(num_blocks=6, block_size=2, max_model_len=12, max_chunk_tokens=2, enable_prefix_caching=False)
    harness.add("a", [1], max_tokens=6)
    late = harness.add("b", list(range(10)), max_tokens=1)
    for _ in range(3):
        harness.step()
    assert harness.status(late) is RequestStatus.PREEMPTED
    harness.drain()
    starts = [share[1] for step in harness.chunks for share in step if share[0] == "b"]
    assert starts == [0, 2, 0, 2, 4, 6, 8]
    assert harness.first_news["b"].queue_time == 0, "it queued until its first step, not until its last admission"
    assert harness.token_ids["b"] == generate(hashed(50), "b", list(range(10)), params(1))
