"""Drafted tokens: verified, cut, dropped and taken back, and never seen from outside."""

from __future__ import annotations

import pytest

from shoal.scheduler.output import FinishReason, SchedulerOutput
from shoal.scheduler.request import RequestStatus
from tests.fakes import Draft, Harness, InjectedError, scripted

PROMPT = [1, 2]
OUTPUT = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
TEXTS = {"a": PROMPT + OUTPUT}


def drafts(num_tokens: int, wrong: int | None = None) -> Draft:
    """Draft the next `num_tokens` tokens of the text; the one with index `wrong` is wrong."""

    def draft(request_id: str, context: list[int]) -> list[int]:
        tokens = TEXTS[request_id][len(context) : len(context) + num_tokens]
        return [99 if index == wrong else token_id for index, token_id in enumerate(tokens)]

    return draft


def deliveries(harness: Harness) -> list[list[int]]:
    """Step until "a" ends; the tokens of each step."""
    harness.add("a", PROMPT, max_tokens=len(OUTPUT))
    delivered = []
    while "a" not in harness.finish_reasons:
        delivered += [news.token_ids for news in harness.step()]
    harness.drain()
    assert harness.token_ids["a"] == OUTPUT
    return delivered


def test_all_accepted_and_one_token_more() -> None:
    harness = Harness(scripted(TEXTS), drafts(3))
    assert deliveries(harness) == [[10], [11, 12, 13, 14], [15, 16, 17, 18], [19]]
    assert harness.chunks == [[("a", 0, 2)], [("a", 2, 4)], [("a", 6, 4)], [("a", 10, 1)]]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (0, [[token_id] for token_id in OUTPUT]),
        (1, [[10], [11, 12], [13, 14], [15, 16], [17, 18], [19]]),
        (2, [[10], [11, 12, 13], [14, 15, 16], [17, 18, 19]]),
    ],
    ids=["first", "middle", "last"],
)
def test_a_mismatch_is_corrected_and_the_rest_taken_back(wrong: int, expected: list[list[int]]) -> None:
    harness = Harness(scripted(TEXTS), drafts(3, wrong))
    assert deliveries(harness) == expected
    ends = [sum(map(len, expected[: index + 1])) for index in range(len(expected))]
    starts = [step[0][1] for step in harness.chunks]
    assert starts == [0] + [len(PROMPT) + end - 1 for end in ends[:-1]], "rejected tokens are computed again"


def test_a_draft_of_another_length_in_each_step() -> None:
    def draft(request_id: str, context: list[int]) -> list[int]:
        return TEXTS["a"][len(context) :][: {3: 2, 6: 0, 7: 1, 9: 3}[len(context)]] if len(context) < 12 else []

    harness = Harness(scripted(TEXTS), draft)
    assert deliveries(harness) == [[10], [11, 12, 13], [14], [15, 16], [17, 18, 19]]
    assert harness.chunks[1:] == [[("a", 2, 3)], [("a", 5, 1)], [("a", 6, 2)], [("a", 8, 3)]]


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_stop_token_inside_accepted_tokens_cuts_what_follows(stop: int) -> None:
    harness = Harness(scripted(TEXTS), drafts(3), block_size=1)
    harness.add("a", PROMPT, max_tokens=10, num_logprobs=0, stop_token_ids=frozenset({OUTPUT[stop]}))
    harness.drain()
    assert harness.token_ids["a"] == OUTPUT[: stop + 1]
    assert harness.finish_reasons["a"] is FinishReason.STOP
    assert [entry.logprob for entry in harness.logprobs["a"]] == [-token_id for token_id in OUTPUT[: stop + 1]]
    assert len(harness.chunks) == 2
    pool = harness.scheduler.kv_cache.pool
    assert sum(map(pool.is_evictable, range(harness.config.num_blocks))) == len(PROMPT) + min(stop, 3) + 1


@pytest.mark.parametrize("max_tokens", range(1, 10))
def test_max_tokens_is_never_exceeded_and_nothing_is_verified_beyond_it(max_tokens: int) -> None:
    harness = Harness(scripted(TEXTS), drafts(4))
    harness.add("a", PROMPT, max_tokens)
    harness.drain()
    assert harness.token_ids["a"] == OUTPUT[:max_tokens]
    assert harness.finish_reasons["a"] is FinishReason.LENGTH
    assert max(start + count for step in harness.chunks for _, start, count in step) < len(PROMPT) + max_tokens


def test_an_executor_that_proposes_too_much_is_cut_at_max_tokens() -> None:
    """Chosen tokens beyond `max_tokens` are cut as well, whatever the executor returns."""
    harness = Harness(scripted(TEXTS))
    request = harness.add("a", PROMPT, max_tokens=2, num_logprobs=0)
    output = harness.scheduler.schedule(harness.now)
    result = harness.executor.execute(output)
    result.token_ids[0] = OUTPUT[:5]
    (news,) = harness.scheduler.update(output, result, harness.now)
    assert news.token_ids == OUTPUT[:2]
    assert news.finish_reason is FinishReason.LENGTH
    assert harness.status(request) is RequestStatus.FINISHED


def test_the_budget_cuts_drafted_tokens() -> None:
    harness = Harness(scripted(TEXTS), drafts(8), max_num_seqs=1, max_num_batched_tokens=3)
    assert deliveries(harness) == [[10], [11, 12, 13], [14, 15, 16], [17, 18, 19]]


def test_drafted_tokens_leave_a_token_of_the_budget_for_each_running_request() -> None:
    texts = dict.fromkeys("abc", PROMPT + OUTPUT)
    harness = Harness(scripted(texts), lambda _, context: TEXTS["a"][len(context) :][:3], max_num_batched_tokens=8)
    for request_id in texts:
        harness.add(request_id, PROMPT, max_tokens=6)
    harness.step()
    harness.step()
    assert harness.chunks[1] == [("a", 2, 4), ("b", 2, 3), ("c", 2, 1)]
    harness.drain()
    assert harness.token_ids == dict.fromkeys(texts, OUTPUT[:6])


def test_a_chunk_limit_of_one_token_leaves_nothing_to_speculate() -> None:
    harness = Harness(scripted(TEXTS), drafts(3), max_chunk_tokens=1)
    assert deliveries(harness) == [[token_id] for token_id in OUTPUT]


def test_drafted_tokens_are_dropped_rather_than_preempting() -> None:
    """Five blocks of two: "a" could verify three tokens only by taking a block of "b"."""
    texts = {"a": [1, 2, 3, *OUTPUT], "b": [4, 5, 6, *OUTPUT]}

    def draft(request_id: str, context: list[int]) -> list[int]:
        return texts[request_id][len(context) :][:3] if request_id == "a" else []

    harness = Harness(scripted(texts), draft, num_blocks=4, block_size=2, max_model_len=8, enable_prefix_caching=False)
    harness.add("a", [1, 2, 3], max_tokens=5)
    late = harness.add("b", [4, 5, 6], max_tokens=2)
    harness.step()
    harness.step()
    assert harness.chunks[1] == [("a", 3, 1), ("b", 3, 1)]
    assert late.num_preemptions == 0
    harness.drain()
    assert harness.token_ids == {"a": OUTPUT[:5], "b": OUTPUT[:2]}
    assert harness.scheduler.stats().num_preemptions == 0


def test_preemption_with_drafted_tokens_pending() -> None:
    texts = {"a": [1, 2, 3, *OUTPUT], "b": [4, 5, 6, *OUTPUT]}

    def draft(request_id: str, context: list[int]) -> list[int]:
        return texts[request_id][len(context) :][:1]

    harness = Harness(scripted(texts), draft, num_blocks=4, block_size=2, max_model_len=8, enable_prefix_caching=False)
    harness.add("a", [1, 2, 3], max_tokens=5)
    late = harness.add("b", [4, 5, 6], max_tokens=5)
    harness.step()
    assert late.spec_token_ids == OUTPUT[1:2]
    for _ in range(2):
        harness.step()
    assert harness.status(late) is RequestStatus.PREEMPTED
    assert late.spec_token_ids == []
    harness.drain()
    assert harness.token_ids == {"a": OUTPUT[:5], "b": OUTPUT[:5]}


@pytest.mark.parametrize("is_under_way", [False, True], ids=["between two steps", "while it is verified"])
def test_abort_with_drafted_tokens_pending(is_under_way: bool) -> None:
    def draft(request_id: str, context: list[int]) -> list[int]:
        return OUTPUT[len(context) - 2 :][:3] if request_id == "a" else []

    harness = Harness(scripted({"a": PROMPT + OUTPUT, "b": PROMPT + OUTPUT}), draft)
    early = harness.add("a", PROMPT, max_tokens=len(OUTPUT))
    harness.add("b", PROMPT, max_tokens=3)
    harness.step()
    assert early.spec_token_ids == OUTPUT[1:4]
    if is_under_way:
        harness.executor.fail = lambda _: harness.abort("a") if "a" in harness.scheduler.running else None
        harness.step()
    else:
        harness.abort("a")
    assert harness.finish_reasons["a"] is FinishReason.ABORT
    harness.drain()
    assert harness.token_ids == {"a": OUTPUT[:1], "b": OUTPUT[:3]}


def test_a_victim_that_would_fit_without_its_drafted_tokens_waits_for_the_next_step() -> None:
    """Six blocks of two: "b" holds four of them with its drafted tokens and loses all; three would suffice."""
    texts = {"a": [1, 2, 3, *OUTPUT], "b": [4, 5, 6, *OUTPUT]}

    def draft(request_id: str, context: list[int]) -> list[int]:
        return [99, 99, 99] if request_id == "b" else []

    harness = Harness(scripted(texts), draft, num_blocks=6, block_size=2, max_model_len=12, enable_prefix_caching=False)
    harness.add("a", [1, 2, 3], max_tokens=4)
    harness.add("b", [4, 5, 6], max_tokens=6)
    for _ in range(4):
        harness.step()
    assert harness.chunks[1:] == [[("a", 3, 1), ("b", 3, 4)], [("a", 4, 1)], [("a", 5, 1), ("b", 0, 5)]]
    assert harness.executor.released[2] == [1]
    harness.drain()
    assert harness.token_ids == {"a": OUTPUT[:4], "b": OUTPUT[:6]}


def test_a_request_alone_in_the_cache_never_needs_more_for_its_drafted_tokens() -> None:
    harness = Harness(scripted(TEXTS), drafts(8), num_blocks=11, block_size=1, max_model_len=12)
    deliveries(harness)
    assert harness.scheduler.stats().num_preemptions == 0


def test_drafted_tokens_of_a_step_that_failed_are_verified_again() -> None:
    harness = Harness(scripted(TEXTS), drafts(3))
    failures = [1]

    def fail(output: SchedulerOutput) -> None:
        if output.scheduled and output.scheduled[0].spec_token_ids and failures:
            failures.pop()
            raise InjectedError("once")

    harness.executor.fail = fail
    assert deliveries(harness) == [[10], [11, 12, 13, 14], [15, 16, 17, 18], [19]]
    assert harness.chunks[1] == harness.chunks[2] == [("a", 2, 4)]
