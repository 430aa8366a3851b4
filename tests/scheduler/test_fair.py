"""The policy `fair`: exact schedules, and the bound on how unequally two clients that wait are served."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.policies.fair import VirtualTokenCounter
from scheduler.request import Request, RequestStatus
from tests.fakes import Harness

Sizes = Sequence[tuple[int, int]]  # of each request: tokens of the prompt, and of the output


def one_row(**limits: int) -> Harness:
    policy = VirtualTokenCounter(prompt_weight=1, output_weight=2)
    return Harness(max_num_seqs=1, policy=policy, enable_prefix_caching=False, **limits)


def add(harness: Harness, client: str, count: int, num_prompt_tokens: int = 1, max_tokens: int = 1) -> None:
    """Requests named by their client and numbered on."""
    first = sum(name.startswith(client) for name in harness.token_ids)
    for index in range(first, first + count):
        harness.add(f"{client}{index}", [1] * num_prompt_tokens, max_tokens, client=client)


def test_clients_take_turns_however_many_requests_they_have() -> None:
    harness = one_row()
    add(harness, "a", 4)
    add(harness, "b", 2)
    harness.drain()
    assert list(harness.finish_reasons) == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_rows_of_one_step_are_shared_too() -> None:
    harness = Harness(max_num_seqs=4, policy=VirtualTokenCounter(1, 2))
    add(harness, "a", 6)
    add(harness, "b", 6)
    harness.step()
    assert [share[0] for share in harness.chunks[0]] == ["a0", "b0", "a1", "b1"]
    harness.drain()


def test_service_is_weighted_tokens() -> None:
    """A request of "a" is 2 + 2 * 3 = 8, one of "b" 1 + 2 * 1 = 3."""
    harness = one_row()
    add(harness, "a", 3, num_prompt_tokens=2, max_tokens=3)
    add(harness, "b", 6)
    harness.drain()
    assert list(harness.finish_reasons) == ["a0", "b0", "b1", "b2", "a1", "b3", "b4", "b5", "a2"]


def test_who_is_alone_has_everything() -> None:
    harness = Harness(max_num_seqs=4, policy=VirtualTokenCounter(1, 2))
    add(harness, "a", 8, max_tokens=2)
    harness.drain()
    assert [len(step) for step in harness.chunks] == [4, 4, 4, 4]


def test_idleness_earns_no_credit() -> None:
    """Whoever comes when others have been served much is lifted to their level, and takes turns from there."""
    harness = one_row()
    add(harness, "a", 10, max_tokens=5)
    for _ in range(20):
        harness.step()
    add(harness, "b", 3, max_tokens=5)
    harness.drain()
    assert list(harness.finish_reasons)[4:10] == ["a4", "b0", "a5", "b1", "a6", "b2"]


def test_who_comes_to_an_empty_queue_is_lifted_to_whoever_left_it_last() -> None:
    harness = one_row()
    add(harness, "a", 5, max_tokens=5)
    harness.drain()
    add(harness, "b", 2, max_tokens=5)
    add(harness, "a", 2, max_tokens=5)
    harness.drain()
    assert list(harness.finish_reasons)[5:] == ["b0", "a5", "b1", "a6"]


def test_what_a_preemption_has_computed_again_is_nobodys_service() -> None:
    policy = VirtualTokenCounter(1, 2)
    harness = Harness(num_blocks=4, block_size=2, max_model_len=8, policy=policy, enable_prefix_caching=False)
    late = harness.add("a", [1, 2, 3], max_tokens=4, client="a")
    other = harness.add("b", [4, 5, 6], max_tokens=4, client="b")
    harness.drain()
    assert late.num_preemptions + other.num_preemptions > 0
    assert policy._client(late).counter == policy._client(other).counter == 3 + 2 * 4


def test_the_client_that_was_served_most_gives_way_for_blocks() -> None:
    policy = VirtualTokenCounter(1, 2)
    harness = Harness(num_blocks=6, block_size=2, max_model_len=12, policy=policy, enable_prefix_caching=False)
    greedy = [harness.add(f"a{i}", [1, 2, 3], max_tokens=4, client="a") for i in range(2)]
    modest = harness.add("b0", [1, 2, 3], max_tokens=4, client="b")
    for _ in range(3):
        harness.step()
    assert [harness.status(request) for request in (*greedy, modest)] == [
        RequestStatus.RUNNING,
        RequestStatus.PREEMPTED,
        RequestStatus.RUNNING,
    ]
    harness.drain()


def test_nobody_takes_a_row() -> None:
    harness = one_row()
    add(harness, "a", 1, max_tokens=9)
    harness.step()
    add(harness, "b", 1)
    harness.drain()
    assert harness.scheduler.stats().num_preemptions == 0


def test_aborts_leave_the_queue() -> None:
    """Whoever has nothing waiting any more is lifted when it comes back."""
    harness = one_row()
    add(harness, "a", 4, max_tokens=5)
    add(harness, "b", 1, max_tokens=5)
    harness.abort("b0")
    for _ in range(5):
        harness.step()
    add(harness, "b", 2, max_tokens=5)
    harness.drain()
    assert [name for name in harness.finish_reasons if name != "b0"] == ["a0", "a1", "b1", "a2", "b2", "a3"]


def test_clients_that_are_gone_are_forgotten() -> None:
    harness = Harness(policy=VirtualTokenCounter(1, 2))
    for index in range(4000):
        harness.add(f"r{index}", [1], max_tokens=1, client=str(index))
        harness.engine.step()
    policy = harness.scheduler.policy
    assert isinstance(policy, VirtualTokenCounter)
    assert len(policy._clients) < 3000


# -- the bound -------------------------------------------------------------------------------------------------------


def differences(harness: Harness, first: Sizes, second: Sizes, disturbances: Sizes) -> list[float]:
    """How much more the first of two clients was served than the second, step by step, while both have requests that
    wait; a third client comes and goes."""
    requests: dict[str, list[Request]] = {"a": [], "b": []}
    for client, sizes in (("a", first), ("b", second)):
        for num_prompt_tokens, max_tokens in sizes:
            prompt = [len(requests[client])] * num_prompt_tokens
            name = f"{client}{len(requests[client])}"
            requests[client].append(harness.add(name, prompt, max_tokens, client=client))

    def service(client: str) -> float:
        admitted = [request for request in requests[client] if request.scheduled_time is not None]
        return sum(request.num_prompt_tokens + 2 * request.num_output_tokens for request in admitted)

    to_come = list(disturbances)
    found = [0.0]
    while all(any(request.scheduled_time is None for request in waiting) for waiting in requests.values()):
        if to_come and harness.now % 3 == 0:
            num_prompt_tokens, max_tokens = to_come.pop()
            harness.add(f"c{len(to_come)}", [7] * num_prompt_tokens, max_tokens, client="c")
        harness.step()
        found.append(service("a") - service("b"))
    harness.drain(10_000)
    return found


def bound(max_num_seqs: int, sizes: Sizes) -> float:
    longest = sorted((num_prompt_tokens + max_tokens for num_prompt_tokens, max_tokens in sizes), reverse=True)
    longest_prompt = max(num_prompt_tokens for num_prompt_tokens, _ in sizes)
    return 2 * max(longest_prompt, 2 * sum(longest[:max_num_seqs]))


sizes = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=8, max_size=20)


@settings(max_examples=60, deadline=None)
@given(
    first=sizes,
    second=sizes,
    disturbances=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=5),
    max_num_seqs=st.integers(1, 4),
    num_blocks=st.integers(6, 16),
    budget=st.integers(4, 20),
)
def test_two_clients_that_wait_are_served_alike(
    *, first: Sizes, second: Sizes, disturbances: Sizes, max_num_seqs: int, num_blocks: int, budget: int
) -> None:
    """In any interval of the time in which both have requests waiting, the paper's bound holds."""
    harness = Harness(
        policy=VirtualTokenCounter(1, 2),
        max_num_seqs=max_num_seqs,
        num_blocks=num_blocks,
        max_num_batched_tokens=budget,
        max_model_len=24,
    )
    found = differences(harness, first, second, disturbances)
    assert max(found) - min(found) <= bound(max_num_seqs, [*first, *second, *disturbances])


@pytest.mark.parametrize("policy", ["fcfs", "fair"])
def test_first_come_first_served_exceeds_the_bound_where_fairness_keeps_it(policy: str) -> None:
    sizes = [(4, 4)] * 40
    found = differences(Harness(policy=policy, max_num_seqs=2), sizes, sizes, [])
    is_fair = max(found) - min(found) <= bound(2, sizes)
    assert is_fair == (policy == "fair")
