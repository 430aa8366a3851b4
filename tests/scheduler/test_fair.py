"""The policy `fair`: exact schedules, and the bound on how unequally two clients that wait are served."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.scheduler.policies.fair import VirtualTokenCounter
from shoal.scheduler.request import Request, RequestStatus
from tests.examples import examples
from tests.fakes import Harness, make_policy, scripted

Sizes = Sequence[tuple[int, int]]  # of each request: tokens of the prompt, and of the output

LEAD = 4  # weighted tokens


def fair(lead: float) -> VirtualTokenCounter:
    return make_policy(VirtualTokenCounter, prompt_weight=1, output_weight=2, fair_lead=lead)


def one_row(**limits: int) -> Harness:
    policy = fair(LEAD)
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
    harness = Harness(max_num_seqs=4, policy=fair(LEAD))
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


def test_a_single_client_gets_all_rows() -> None:
    harness = Harness(max_num_seqs=4, policy=fair(LEAD))
    add(harness, "a", 8, max_tokens=2)
    harness.drain()
    assert [len(step) for step in harness.chunks] == [4, 4, 4, 4]


def test_idleness_earns_no_credit() -> None:
    """A new client is lifted to the level of clients that were served before it; from then on they take turns."""
    harness = one_row()
    add(harness, "a", 10, max_tokens=5)
    for _ in range(20):
        harness.step()
    add(harness, "b", 3, max_tokens=5)
    harness.drain()
    assert list(harness.finish_reasons)[4:10] == ["a4", "b0", "a5", "b1", "a6", "b2"]


def test_a_client_that_comes_to_an_empty_queue_is_lifted_to_the_last_one_that_left_it() -> None:
    harness = one_row()
    add(harness, "a", 5, max_tokens=5)
    harness.drain()
    add(harness, "b", 2, max_tokens=5)
    add(harness, "a", 2, max_tokens=5)
    harness.drain()
    assert list(harness.finish_reasons)[5:] == ["b0", "a5", "b1", "a6"]


def test_what_is_computed_again_after_a_preemption_does_not_count_as_service() -> None:
    policy = fair(LEAD)
    harness = Harness(num_blocks=4, block_size=2, max_model_len=8, policy=policy, enable_prefix_caching=False)
    late = harness.add("a", [1, 2, 3], max_tokens=4, client="a")
    other = harness.add("b", [4, 5, 6], max_tokens=4, client="b")
    harness.drain()
    assert late.num_preemptions + other.num_preemptions > 0
    assert policy._client(late).counter == policy._client(other).counter == 3 + 2 * 4


def test_the_client_that_was_served_most_gives_way_for_blocks() -> None:
    policy = fair(LEAD)
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


def test_aborts_leave_the_queue() -> None:
    """A client without waiting requests is lifted when it returns, to the level less two leads: 22 - 8."""
    harness = one_row()
    add(harness, "a", 5, max_tokens=5)
    add(harness, "b", 1, max_tokens=5)
    harness.abort("b0")
    for _ in range(10):
        harness.step()
    add(harness, "b", 3, max_tokens=5)
    harness.drain()
    assert list(harness.finish_reasons) == ["b0", "a0", "a1", "b1", "a2", "b2", "a3", "b3", "a4"]


def test_clients_that_are_gone_are_forgotten() -> None:
    harness = Harness(policy=fair(LEAD))
    for index in range(4000):
        harness.add(f"r{index}", [1], max_tokens=1, client=str(index))
        harness.engine.step()
    policy = harness.scheduler.policy
    assert isinstance(policy, VirtualTokenCounter)
    assert len(policy._clients) < 3000


# -- within a step ---------------------------------------------------------------------------------------------------


def test_the_client_that_is_ahead_pauses_until_the_other_has_caught_up() -> None:
    """After the first step "a" was served 9 and "b" 3; a step of "a" is 6, one of "b" 2."""
    harness = Harness(max_num_seqs=4, policy=fair(LEAD))
    add(harness, "a", 3, max_tokens=5)
    add(harness, "b", 1, max_tokens=5)
    harness.drain()
    assert harness.chunks == [
        [("a0", 0, 1), ("b0", 0, 1), ("a1", 0, 1), ("a2", 0, 1)],
        [("b0", 1, 1)],
        [("b0", 2, 1), ("a0", 1, 1), ("a1", 1, 1), ("a2", 1, 1)],
        [("b0", 3, 1)],
        [("b0", 4, 1)],
        *([(f"a{index}", step, 1) for index in range(3)] for step in range(2, 5)),
    ]


def test_with_a_long_lead_no_client_pauses() -> None:
    harness = Harness(max_num_seqs=4, policy=fair(1e9))
    add(harness, "a", 3, max_tokens=5)
    add(harness, "b", 1, max_tokens=5)
    harness.drain()
    assert [len(step) for step in harness.chunks] == [4] * 5


def test_no_request_joins_for_a_client_that_pauses() -> None:
    harness = Harness(max_num_seqs=4, policy=fair(LEAD))
    add(harness, "a", 2, max_tokens=5)
    add(harness, "b", 1, max_tokens=5)
    harness.step()
    add(harness, "a", 1)
    harness.step()
    harness.step()
    assert harness.chunks[1:] == [[("b0", 1, 1), ("a0", 1, 1), ("a1", 1, 1), ("a2", 0, 1)], [("b0", 2, 1)]]
    add(harness, "a", 1)
    harness.step()
    harness.step()
    assert harness.chunks[3:] == [[("b0", 3, 1)], [("b0", 4, 1), ("a0", 2, 1), ("a1", 2, 1), ("a3", 0, 1)]]
    harness.drain()


def test_a_row_is_taken_from_the_client_that_was_served_more() -> None:
    """ "b" comes at the level of "a", 12, and takes the row when "a" has 20; then "a" pauses until "b" has 16."""
    harness = Harness(max_num_seqs=4, policy=fair(LEAD))
    add(harness, "a", 5, max_tokens=6)
    harness.step()
    add(harness, "b", 2, max_tokens=3)
    harness.drain()
    older = [("a0", 1), ("a1", 1), ("a2", 1)]

    def older_at(place: int) -> list[tuple[str, int, int]]:
        return [(name, place, count) for name, count in older]

    assert harness.chunks[:10] == [
        [*older_at(0), ("a3", 0, 1)],
        [*older_at(1), ("a3", 1, 1)],
        [("b0", 0, 1)],
        [("b0", 1, 1)],
        [("b0", 2, 1), *older_at(2)],
        [("b1", 0, 1)],
        [("b1", 1, 1), *older_at(3)],
        [("b1", 2, 1)],
        [*older_at(4), ("a3", 0, 3)],
        [*older_at(5), ("a3", 3, 1)],
    ]
    assert harness.scheduler.stats().num_preemptions == 1


def test_a_client_that_returns_gets_a_row_at_once() -> None:
    """ "b" has a credit of 8: it is lifted to 20 - 8, and a row of "a" costs 2."""
    harness = Harness(max_num_seqs=4, policy=fair(LEAD))
    add(harness, "b", 1)
    harness.step()
    add(harness, "a", 5, max_tokens=9)
    harness.step()
    harness.step()
    add(harness, "b", 1, max_tokens=3)
    harness.step()
    harness.step()
    assert harness.chunks[3:] == [[("b1", 0, 1)], [("b1", 1, 1)]]
    harness.drain()


@pytest.mark.parametrize(("num_rows", "num_preemptions"), [(1, 0), (2, 1), (3, 1), (6, 2), (16, 5)])
def test_rows_are_taken_from_clients_that_have_twice_as_many(num_rows: int, num_preemptions: int) -> None:
    policy = fair(100)
    harness = Harness(max_num_seqs=num_rows, policy=policy, num_blocks=200)
    add(harness, "b", 1)
    harness.step()
    add(harness, "a", num_rows + 1, max_tokens=100)
    for _ in range(40):
        harness.step()
    add(harness, "b", num_rows, max_tokens=20)
    harness.step()
    assert harness.scheduler.stats().num_preemptions == num_preemptions
    harness.drain()


def test_no_row_is_taken_for_less_than_it_costs() -> None:
    harness = Harness(max_num_seqs=2, policy=fair(LEAD))
    add(harness, "b", 1)
    harness.step()
    add(harness, "a", 3, num_prompt_tokens=20, max_tokens=4)
    harness.step()
    add(harness, "b", 1)
    harness.step()
    assert harness.chunks[2:] == [[("a0", 20, 1), ("a1", 20, 1)]], "8 of credit against 20 tokens"
    harness.drain()


def test_a_paused_request_keeps_its_drafted_tokens() -> None:
    texts = {name: list(range(start, start + 12)) for name, start in (("a0", 10), ("a1", 30), ("b0", 50))}

    def draft(request_id: str, context: list[int]) -> list[int]:
        return texts[request_id][len(context) : len(context) + 2] if request_id != "b0" else []

    harness = Harness(scripted(texts), draft, max_num_seqs=3, policy=fair(LEAD))
    for name, text in texts.items():
        harness.add(name, text[:1], max_tokens=9, client=name[0])
    harness.drain()
    assert harness.chunks[:8] == [
        [("a0", 0, 1), ("b0", 0, 1), ("a1", 0, 1)],
        [("b0", 1, 1), ("a0", 1, 3), ("a1", 1, 3)],
        *([("b0", place, 1)] for place in range(2, 7)),
        [("b0", 7, 1), ("a0", 4, 3), ("a1", 4, 3)],
    ]
    assert harness.token_ids == {name: text[1:10] for name, text in texts.items()}


@pytest.mark.parametrize("lead", [0.5, 10.0, 1e6])
def test_an_endless_stream_of_short_requests_starves_no_request(lead: float) -> None:
    harness = Harness(max_num_seqs=3, policy=fair(lead), max_num_waiting=10**6)
    add(harness, "a", 4, max_tokens=20)
    for _ in range(200):
        add(harness, "b", 1, max_tokens=3)
        harness.step()
    assert {"a0", "a1", "a2", "a3"} <= harness.finish_reasons.keys()
    harness.drain()


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


@settings(max_examples=examples(60))
@given(
    first=sizes,
    second=sizes,
    disturbances=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=5),
    max_num_seqs=st.integers(1, 4),
    num_blocks=st.integers(6, 16),
    budget=st.integers(4, 20),
    lead=st.sampled_from([0.5, 10.0, 1000.0]),
)
def test_two_clients_that_wait_are_served_equally(
    *, first: Sizes, second: Sizes, disturbances: Sizes, max_num_seqs: int, num_blocks: int, budget: int, lead: float
) -> None:
    """In any interval of the time in which both have requests waiting, the paper's bound holds."""
    harness = Harness(
        policy=fair(lead),
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
