"""The policy `sjf`: exact schedules with an oracle, effects of wrong predictions, and that no request starves."""

from __future__ import annotations

from shoal.scheduler.policies.fcfs import FirstComeFirstServed
from shoal.scheduler.policies.policy import Policy
from shoal.scheduler.policies.predictor import LearnedLengths, MaxTokens, Oracle, Predictor
from shoal.scheduler.policies.sjf import ShortestJobFirst
from shoal.scheduler.request import RequestStatus
from tests.fakes import LIMITS, Harness, generate, hashed, make_policy, params

FAST, SLOW = 1e6, 1e-6  # tokens a second: waiting counts for everything, or for nothing


def sjf(predictor: Predictor, ageing_tokens: float) -> ShortestJobFirst:
    return ShortestJobFirst(LIMITS, ShortestJobFirst.Knobs(ageing_tokens=ageing_tokens), predictor)


def test_the_shortest_goes_first() -> None:
    harness = Harness(max_num_seqs=1, policy=sjf(MaxTokens(), 1.0))
    for request_id, max_tokens in (("long", 5), ("short", 1), ("middle", 3)):
        harness.add(request_id, [1], max_tokens)
    harness.drain()
    assert list(harness.finish_reasons) == ["short", "middle", "long"]


def test_an_oracle_sees_more_than_max_tokens() -> None:
    lengths = {"a": 7, "b": 2, "c": 4}
    harness = Harness(max_num_seqs=1, policy=sjf(Oracle(lengths), 1.0))
    for request_id, length in lengths.items():
        prompt = [ord(request_id)]
        stop = generate(hashed(50), request_id, prompt, params(length))[-1]
        harness.add(request_id, prompt, 40, stop_token_ids=frozenset([stop]))
    harness.drain()
    assert list(harness.finish_reasons) == ["b", "c", "a"]
    assert {name: len(tokens) for name, tokens in harness.token_ids.items()} == lengths


def test_a_tenth_of_a_prompt_is_work_too() -> None:
    harness = Harness(max_num_seqs=1, policy=sjf(MaxTokens(), 1.0))
    harness.add("long prompt", list(range(40)), max_tokens=1)  # 1 + 4
    harness.add("long output", [1], max_tokens=4)  # 4 + 0.1
    harness.drain()
    assert list(harness.finish_reasons) == ["long output", "long prompt"]


def test_a_full_batch_has_a_row_for_less_work() -> None:
    policy = sjf(MaxTokens(), 10.0)
    harness = Harness(max_num_seqs=1, policy=policy, enable_prefix_caching=False)
    harness.add("long", [1, 2], max_tokens=30)
    harness.step()
    harness.add("short", [3], max_tokens=2)
    for _ in range(3):
        harness.step()
    assert harness.chunks == [[("long", 0, 2)], [("short", 0, 1)], [("short", 1, 1)], [("long", 0, 3)]]
    harness.drain()
    assert harness.token_ids["long"] == generate(hashed(50), "long", [1, 2], params(30))


def test_a_row_is_not_taken_where_more_work_is_lost_than_saved() -> None:
    """80 computed tokens are work of 8, and the new request has 7 less left."""
    harness = Harness(max_num_seqs=1, max_num_batched_tokens=128, policy=sjf(MaxTokens(), 1000.0))
    running = harness.add("long", list(range(80)), max_tokens=10)
    harness.step()
    harness.add("short", [3], max_tokens=2)
    harness.step()
    assert harness.status(running) is RequestStatus.RUNNING
    harness.drain()
    assert harness.scheduler.stats().num_preemptions == 0


def test_the_most_work_left_gives_way_for_blocks() -> None:
    policy = sjf(MaxTokens(), 1.0)
    harness = Harness(num_blocks=4, block_size=2, max_model_len=10, policy=policy, enable_prefix_caching=False)
    longest = harness.add("long", [1, 2, 3], max_tokens=5)
    harness.add("short", [4, 5, 6], max_tokens=4)
    for _ in range(3):
        harness.step()
    assert harness.status(longest) is RequestStatus.PREEMPTED
    harness.drain()


def test_a_request_that_exceeds_its_prediction_is_expected_to_need_as_much_again() -> None:
    policy = sjf(Oracle({"a": 3}), 1.0)
    harness = Harness(policy=policy)
    request = harness.add("a", [1] * 10, max_tokens=7)
    left = []
    while not harness.finish_reasons:
        left.append(round(policy.key(request), 6))
        harness.step()
    assert left == [4.0, 2.1, 1.1, 3.1, 2.1, 1.1, 1.1], "up to 3, up to 6, and no further than max_tokens"
    harness.drain()


def test_a_request_that_arrives_with_output_has_less_work_left() -> None:
    policy = sjf(Oracle({"a": 4, "b": 6}), 1.0)
    harness = Harness(max_num_seqs=1, policy=policy)
    harness.add("a", [1], max_tokens=20)
    waiting = harness.scheduler.waiting["a"]
    resumed = type(waiting)("b", [1], params(20), 0.0, output_token_ids=[5] * 3)
    harness.scheduler.add(resumed)
    assert policy.key(resumed) < policy.key(waiting)
    outlived = type(waiting)("a", [1], params(20), 0.0, output_token_ids=[5] * 4)
    policy.on_arrival(outlived)
    assert round(policy.key(outlived), 6) == 4.5, "4 more, and 5 tokens to compute"
    for request_id in "ab":
        harness.scheduler.abort(request_id)


def stream_of_short_ones(ageing_tokens: float, num_steps: int) -> Harness:
    """One row; a request with 10 tokens of work, and a short one for every two steps that takes both."""
    policy = sjf(MaxTokens(), ageing_tokens)
    harness = Harness(max_num_seqs=1, policy=policy, enable_prefix_caching=False)
    harness.add("long", [1], max_tokens=10)
    for step in range(num_steps):
        if step % 2 == 0:
            harness.add(f"short{step}", [2], max_tokens=2)
        harness.step()
    return harness


def test_a_request_that_arrives_much_later_does_not_overtake() -> None:
    """10.1 tokens of work at half a token a second: no request that arrives more than 20.2 seconds later overtakes."""
    harness = stream_of_short_ones(0.5, 60)
    before = list(harness.finish_reasons)[: list(harness.finish_reasons).index("long")]
    assert 0 < len(before) <= 11
    harness.drain()


def test_without_ageing_it_would_wait_for_ever() -> None:
    harness = stream_of_short_ones(SLOW, 200)
    assert "long" not in harness.finish_reasons
    harness.drain()


def test_with_the_fastest_ageing_it_is_first_come_first_served() -> None:
    harness = stream_of_short_ones(FAST, 30)
    assert list(harness.finish_reasons)[:2] == ["short0", "long"]
    harness.drain()


def mean_latency(policy: Policy) -> float:
    """In steps, of 90 requests under load.  The client tells the third that is long; `max_tokens` tells nothing."""
    stop, length = 0, {True: 24, False: 2}
    is_long = {f"r{index}": index % 3 == 0 for index in range(90)}

    def choose(request_id: str, context: list[int]) -> int:
        return stop if len(context) >= length[is_long[request_id]] else 1

    harness = Harness(choose, policy=policy, max_num_seqs=4)
    latencies: list[float] = []
    arrivals: dict[str, float] = {}
    to_come = list(is_long)
    while to_come or harness.scheduler.num_unfinished:
        if to_come and harness.now % 5 != 0:
            request_id = to_come.pop(0)
            arrivals[request_id] = harness.now
            client = "long" if is_long[request_id] else "short"
            harness.add(request_id, [9], 100, stop_token_ids=frozenset([stop]), client=client)
        ended = [output.request_id for output in harness.step() if output.finish_reason]
        latencies += [harness.now - arrivals[request_id] for request_id in ended]
    return sum(latencies) / len(latencies)


def test_what_was_learned_shortens_the_wait() -> None:
    fcfs = mean_latency(make_policy(FirstComeFirstServed))
    learned = mean_latency(sjf(LearnedLengths(), SLOW))
    oracle = mean_latency(sjf(Oracle({f"r{i}": 2 if i % 3 else 24 for i in range(90)}), SLOW))
    assert oracle < 0.5 * fcfs
    assert oracle <= learned < 0.6 * fcfs
