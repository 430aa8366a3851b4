"""The seam of the policies: first come first served, and others that are written here and need nothing else."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytest

from scheduler.errors import ConfigError
from scheduler.output import FinishReason
from scheduler.policies import POLICIES, create_policy
from scheduler.policies.fcfs import FirstComeFirstServed
from scheduler.request import Request, RequestStatus
from tests.fakes import Harness, generate, hashed, params


def admissions(harness: Harness) -> list[list[str]]:
    """Who had a first share in each step."""
    return [[request_id for request_id, start, _ in step if start == 0] for step in harness.chunks]


def test_policies_are_made_by_name() -> None:
    assert isinstance(create_policy("fcfs"), FirstComeFirstServed)
    with pytest.raises(ConfigError, match=f"'lifo'.*{', '.join(POLICIES)}") as caught:
        create_policy("lifo")
    assert caught.value.param == "policy"


def test_fcfs_names_the_latest_arrival_and_never_preempts_for_a_newcomer() -> None:
    policy = FirstComeFirstServed()
    first, second, third = (Request(name, [1], params(), 0.0) for name in "abc")
    assert list(policy.order([first, second], 0.0)) == [first, second]
    assert policy.victim(first, [first, second], 0.0) is second
    assert policy.victim(second, [first, second], 0.0) is None
    assert policy.victim(third, [first, second], 0.0) is None


class UrgentFirst(FirstComeFirstServed):
    """Requests whose id starts with "!" go first, and may take the blocks of those that are not urgent."""

    @staticmethod
    def _is_urgent(request: Request) -> bool:
        return request.request_id.startswith("!")

    def order(self, waiting: Collection[Request], now: float) -> Iterable[Request]:
        return sorted(waiting, key=self._is_urgent, reverse=True)

    def victim(self, request: Request, running: Collection[Request], now: float) -> Request | None:
        others = [other for other in running if not self._is_urgent(other)]
        return others[-1] if others and self._is_urgent(request) else super().victim(request, running, now)


def test_a_policy_may_order_the_waiting() -> None:
    harness = Harness(max_num_seqs=1, policy=UrgentFirst())
    for request_id in ("a", "b", "!c"):
        harness.add(request_id, [1], max_tokens=1)
    harness.drain()
    assert list(harness.finish_reasons) == ["!c", "a", "b"]


def test_a_policy_may_preempt_for_a_waiting_request() -> None:
    harness = Harness(num_blocks=4, block_size=2, max_model_len=9, policy=UrgentFirst(), enable_prefix_caching=False)
    victims = [harness.add(request_id, [1, 2, 3], max_tokens=2) for request_id in "ab"]
    harness.step()
    harness.add("!c", [4, 5, 6, 7], max_tokens=2)
    harness.step()
    assert [harness.status(victim) for victim in victims] == [RequestStatus.FINISHED, RequestStatus.PREEMPTED]
    assert harness.chunks[-1] == [("a", 3, 1), ("!c", 0, 4)], "the share that the victim had in this step is gone"
    assert harness.executor.released[-1] == ["b"]
    harness.drain()
    for request_id, prompt in (("a", [1, 2, 3]), ("b", [1, 2, 3]), ("!c", [4, 5, 6, 7])):
        assert harness.token_ids[request_id] == generate(hashed(50), request_id, prompt, params(2))


def test_the_share_of_a_victim_goes_back_into_the_budget() -> None:
    harness = Harness(
        num_blocks=6,
        block_size=2,
        max_model_len=13,
        max_num_batched_tokens=8,
        policy=UrgentFirst(),
        enable_prefix_caching=False,
    )
    harness.add("a", list(range(12)), max_tokens=1)
    harness.step()
    harness.add("!b", list(range(20, 30)), max_tokens=1)
    harness.step()
    assert harness.chunks == [[("a", 0, 8)], [("!b", 0, 8)]]
    harness.drain()


class StaticBatches(FirstComeFirstServed):
    """Requests join an empty batch only, and nobody joins until all of it has finished."""

    def __init__(self) -> None:
        self._is_forming: bool | None = None

    def order(self, waiting: Collection[Request], now: float) -> Iterable[Request]:
        self._is_forming = None  # decided when the first of them is asked about
        return waiting

    def admits(self, request: Request, running: Collection[Request], now: float) -> bool:
        if self._is_forming is None:
            self._is_forming = not running
        return self._is_forming


def test_a_policy_may_admit_into_an_empty_batch_only() -> None:
    harness = Harness(max_num_seqs=3, policy=StaticBatches())
    for index, max_tokens in enumerate((1, 4, 2, 1, 3)):
        harness.add(f"r{index}", [index], max_tokens)
    harness.drain()
    assert admissions(harness) == [["r0", "r1", "r2"], [], [], [], ["r3", "r4"], [], []]
    assert set(harness.finish_reasons.values()) == {FinishReason.LENGTH}


def test_static_batches_that_outgrow_the_cache_are_served_all_the_same() -> None:
    harness = Harness(num_blocks=4, block_size=2, max_model_len=8, policy=StaticBatches())
    for request_id in "abc":
        harness.add(request_id, [ord(request_id)], max_tokens=6)
    harness.drain()
    assert harness.scheduler.stats().num_preemptions > 0
    for request_id in "abc":
        assert harness.token_ids[request_id] == generate(hashed(50), request_id, [ord(request_id)], params(6))


class ShortestFirst(FirstComeFirstServed):
    """The least work left goes first; whoever has the most of it gives way."""

    def order(self, waiting: Collection[Request], now: float) -> Iterable[Request]:
        return sorted(waiting, key=lambda request: request.max_num_tokens - request.num_tokens)


def test_a_policy_sees_what_the_requests_have_left_to_do() -> None:
    harness = Harness(max_num_seqs=1, policy=ShortestFirst())
    for request_id, max_tokens in (("long", 5), ("short", 1), ("middle", 3)):
        harness.add(request_id, [1], max_tokens)
    harness.drain()
    assert list(harness.finish_reasons) == ["short", "middle", "long"]


def test_nobody_takes_the_blocks_that_a_preemption_freed_in_the_same_step() -> None:
    harness = Harness(num_blocks=4, block_size=2, max_model_len=8, policy=ShortestFirst(), enable_prefix_caching=False)
    harness.add("a", [1, 2, 3], max_tokens=4)
    harness.add("b", [4, 5, 6], max_tokens=4)
    harness.step()
    harness.step()
    harness.add("c", [7], max_tokens=1)
    harness.step()
    assert harness.chunks[-1] == [("a", 4, 1)], "one block is free, and the shortest request would fit"
    harness.drain()


class SkipsUntil(FirstComeFirstServed):
    """Passes over requests until the second that stands in their id."""

    def admits(self, request: Request, running: Collection[Request], now: float) -> bool:
        return now >= float(request.request_id)


def test_a_policy_is_told_the_time_and_may_pass_over_a_request() -> None:
    harness = Harness(policy=SkipsUntil())
    for request_id in ("3", "0", "2"):
        harness.add(request_id, [1], max_tokens=1)
    for _ in range(5):
        harness.step()
    assert {step[0].request_id: time for time, step in enumerate(harness.executor.steps) if step} == {
        "0": 0,
        "2": 2,
        "3": 3,
    }
