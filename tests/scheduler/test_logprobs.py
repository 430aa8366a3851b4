"""Log-probabilities: each position exactly once, however often it was computed.

The fake executor's entries tell where they belong: `rank` is the position and `logprob` is minus the token id.
"""

from __future__ import annotations

import pytest

from tests.fakes import Harness


def assert_scored_once(harness: Harness, request_id: str, prompt: list[int]) -> None:
    entries = [(entry.rank, -entry.logprob) for entry in harness.prompt_logprobs[request_id]]
    assert entries == list(enumerate(prompt))[1:]


def assert_each_token_has_its_own(harness: Harness, request_id: str, prompt: list[int]) -> None:
    entries = [(entry.rank, -entry.logprob) for entry in harness.logprobs[request_id]]
    assert entries == list(enumerate(harness.token_ids[request_id], start=len(prompt)))


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 100])
@pytest.mark.parametrize("length", [1, 2, 5, 9])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_each_prompt_position_is_scored_once_across_chunks(chunk: int, length: int, max_tokens: int) -> None:
    harness = Harness(max_chunk_tokens=chunk)
    prompt = list(range(20, 20 + length))
    harness.add("a", prompt, max_tokens, num_logprobs=0, num_prompt_logprobs=0)
    harness.drain()
    assert_scored_once(harness, "a", prompt)
    assert_each_token_has_its_own(harness, "a", prompt)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_each_prompt_position_is_scored_once_across_preemptions(chunk: int) -> None:
    harness = Harness(num_blocks=6, block_size=2, max_model_len=12, max_chunk_tokens=chunk)
    prompts = {"a": [1, 2, 3], "b": [4, 5, 6, 7, 8], "c": [4, 5, 6]}
    for request_id, prompt in prompts.items():
        harness.add(request_id, prompt, max_tokens=5, num_logprobs=0, num_prompt_logprobs=0)
    harness.drain()
    assert harness.scheduler.stats().num_preemptions > 0
    for request_id, prompt in prompts.items():
        assert_scored_once(harness, request_id, prompt)
        assert_each_token_has_its_own(harness, request_id, prompt)


def test_a_prompt_that_is_to_be_scored_is_computed_although_it_is_cached() -> None:
    harness = Harness()
    prompt = list(range(9))
    harness.add("a", prompt)
    harness.drain()
    harness.add("b", prompt, max_tokens=0, num_prompt_logprobs=0)
    harness.drain()
    assert harness.chunks[-1] == [("b", 0, 9)]
    assert_scored_once(harness, "b", prompt)
    assert harness.first_news["b"].num_cached_tokens == 0


def test_only_requests_that_ask_for_log_probabilities_get_them() -> None:
    harness = Harness()
    harness.add("a", [1, 2, 3], num_prompt_logprobs=0)
    harness.add("b", [1, 2, 3], num_logprobs=0)
    harness.add("c", [1, 2, 3])
    outputs = []
    while harness.scheduler.num_unfinished:
        outputs += harness.step()
    for news in outputs:
        assert (news.logprobs is not None) == (news.request_id == "b")
        assert (news.prompt_logprobs is not None) <= (news.request_id == "a")
    assert_scored_once(harness, "a", [1, 2, 3])
    assert_each_token_has_its_own(harness, "b", [1, 2, 3])
