"""The policy `deadline`: exact schedules by when the next token is due."""

from __future__ import annotations

from shoal.scheduler.policies.deadline import EarliestDeadlineFirst
from shoal.scheduler.request import RequestStatus
from tests.fakes import Harness, generate, hashed, make_policy, params


def edf() -> EarliestDeadlineFirst:
    return make_policy(EarliestDeadlineFirst, ttft_slo_ms=10_000, tpot_slo_ms=1000)


def test_the_first_token_that_is_due_comes_first() -> None:
    harness = Harness(max_num_seqs=1, policy=edf())
    for request_id, ttft_slo_ms in (("late", 20_000.0), ("default", None), ("soon", 500.0), ("as default", 10_000.0)):
        harness.add(request_id, [1], max_tokens=1, ttft_slo_ms=ttft_slo_ms)
    harness.drain()
    assert list(harness.finish_reasons) == ["soon", "default", "as default", "late"]


def test_a_deadline_counts_from_arrival_and_with_every_token() -> None:
    policy = edf()
    harness = Harness(policy=policy)
    harness.now = 100.0
    request = harness.add("a", [1], max_tokens=3, tpot_slo_ms=250.0)
    due = []
    for _ in range(2):
        due.append(policy.key(request))
        harness.step()
    assert [*due, policy.key(request)] == [110.0, 110.25, 110.5]
    harness.drain()


def test_a_late_request_is_served_first() -> None:
    harness = Harness(max_num_seqs=1, policy=edf())
    harness.add("first", [1], max_tokens=5)
    harness.step()
    harness.add("missed", [2], max_tokens=1, ttft_slo_ms=1000.0)
    for _ in range(3):
        harness.step()
    harness.add("in time", [3], max_tokens=1, ttft_slo_ms=2000.0)
    harness.drain()
    assert list(harness.finish_reasons) == ["first", "missed", "in time"]


def test_no_request_takes_a_row() -> None:
    harness = Harness(max_num_seqs=1, policy=edf())
    harness.add("a", [1], max_tokens=4)
    harness.step()
    harness.add("b", [2], max_tokens=1, ttft_slo_ms=1.0)
    harness.drain()
    assert harness.scheduler.stats().num_preemptions == 0


def test_the_budget_goes_to_the_least_slack() -> None:
    harness = Harness(max_num_seqs=2, max_num_batched_tokens=4, policy=edf(), enable_prefix_caching=False)
    harness.add("a", list(range(8)), max_tokens=1)
    harness.step()
    harness.add("b", [20, 21, 22], max_tokens=1, ttft_slo_ms=1000.0)
    harness.drain()
    assert harness.chunks == [[("a", 0, 4)], [("b", 0, 3), ("a", 4, 1)], [("a", 5, 3)]]


def test_the_most_slack_gives_way_for_blocks() -> None:
    harness = Harness(num_blocks=4, block_size=2, max_model_len=8, policy=edf(), enable_prefix_caching=False)
    relaxed = harness.add("relaxed", [1, 2, 3], max_tokens=4, ttft_slo_ms=60_000.0)
    harness.add("tight", [4, 5, 6], max_tokens=4)
    for _ in range(3):
        harness.step()
    assert harness.status(relaxed) is RequestStatus.PREEMPTED
    harness.drain()
    assert harness.token_ids["relaxed"] == generate(hashed(50), "relaxed", [1, 2, 3], params(4))


def test_a_request_that_arrives_after_the_deadline_of_another_does_not_overtake_it() -> None:
    harness = Harness(max_num_seqs=1, policy=edf())
    harness.add("patient", [1], max_tokens=1, ttft_slo_ms=8000.0)
    for step in range(20):
        harness.add(f"{step}", [2], max_tokens=1, ttft_slo_ms=1.0)
        harness.step()
    assert list(harness.finish_reasons)[:9] == [*map(str, range(8)), "patient"]
    harness.drain()
