"""The policy `priority`: exact schedules, and that waiting makes up for priority."""

from __future__ import annotations

from shoal.scheduler.policies.priority import Priority
from shoal.scheduler.request import RequestStatus
from tests.fakes import Harness, generate, hashed, make_policy, params


def urgent_stream(ageing_seconds: float, num_steps: int) -> Harness:
    """One row; a request without hurry, and an urgent one for every two steps that takes both."""
    harness = Harness(
        max_num_seqs=1, policy=make_policy(Priority, ageing_seconds=ageing_seconds), enable_prefix_caching=False
    )
    harness.add("patient", [1], max_tokens=3, priority=3)
    for step in range(num_steps):
        if step % 2 == 0:
            harness.add(f"urgent{step}", [2], max_tokens=2)
        harness.step()
    return harness


def test_the_lowest_priority_goes_first_and_among_equals_the_first() -> None:
    harness = Harness(max_num_seqs=1, policy=make_policy(Priority, ageing_seconds=10))
    for request_id, priority in (("a", 1), ("b", 0), ("c", -5), ("d", 0)):
        harness.add(request_id, [1], max_tokens=1, priority=priority)
    harness.drain()
    assert list(harness.finish_reasons) == ["c", "b", "d", "a"]


def test_a_full_batch_has_a_row_for_the_urgent() -> None:
    harness = Harness(max_num_seqs=2, policy=make_policy(Priority, ageing_seconds=10), enable_prefix_caching=False)
    first = harness.add("first", [1, 2], max_tokens=4, priority=1)
    harness.add("second", [3, 4], max_tokens=4)
    harness.step()
    harness.add("urgent", [5, 6, 7], max_tokens=2, priority=-1)
    harness.step()
    assert harness.status(first) is RequestStatus.PREEMPTED
    harness.drain()
    assert harness.chunks == [
        [("second", 0, 2), ("first", 0, 2)],
        [("urgent", 0, 3), ("second", 2, 1)],
        [("urgent", 3, 1), ("second", 3, 1)],
        [("second", 4, 1), ("first", 0, 3)],
        [("first", 3, 1)],
        [("first", 4, 1)],
    ]
    assert harness.token_ids["first"] == generate(hashed(50), "first", [1, 2], params(4))


def test_several_urgent_requests_have_rows_in_one_step() -> None:
    harness = Harness(max_num_seqs=2, policy=make_policy(Priority, ageing_seconds=10))
    for request_id in "ab":
        harness.add(request_id, [1], max_tokens=4, priority=1)
    harness.step()
    for request_id in "cde":
        harness.add(request_id, [2], max_tokens=1)
    harness.step()
    assert harness.chunks[-1] == [("c", 0, 1), ("d", 0, 1)]
    harness.drain()


def test_no_request_takes_a_row_from_an_equal_one() -> None:
    harness = Harness(max_num_seqs=1, policy=make_policy(Priority, ageing_seconds=10))
    for request_id in "ab":
        harness.add(request_id, [1], max_tokens=3)
    harness.drain()
    assert list(harness.finish_reasons) == ["a", "b"]
    assert harness.scheduler.stats().num_preemptions == 0


def test_the_least_urgent_gives_way_for_blocks_whenever_it_came() -> None:
    harness = Harness(
        num_blocks=4,
        block_size=2,
        max_model_len=8,
        policy=make_policy(Priority, ageing_seconds=10),
        enable_prefix_caching=False,
    )
    late = harness.add("late", [1, 2, 3], max_tokens=4, priority=1)
    harness.add("soon", [4, 5, 6], max_tokens=4)
    for _ in range(3):
        harness.step()
    assert harness.status(late) is RequestStatus.PREEMPTED
    assert harness.chunks[-1] == [("soon", 4, 1)]
    harness.drain()
    assert list(harness.finish_reasons) == ["soon", "late"]


def test_waiting_makes_up_for_priority() -> None:
    """Three levels at five seconds each: a request that arrives 15 seconds later is behind, although it is urgent."""
    harness = urgent_stream(5, 30)
    assert harness.finish_reasons["patient"]
    urgent = [name for name in harness.finish_reasons if name.startswith("urgent")]
    assert list(harness.finish_reasons).index("patient") == urgent.index("urgent14") + 1
    harness.drain()


def test_without_ageing_it_would_wait_for_ever() -> None:
    harness = urgent_stream(1e9, 200)
    assert "patient" not in harness.finish_reasons
    harness.drain()
