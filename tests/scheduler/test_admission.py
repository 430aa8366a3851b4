"""Admission: what is refused, at the exact limits."""

from __future__ import annotations

import pytest

from shoal.scheduler.admission import check_queue, check_request
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import ConfigError, ContextLengthError, InvalidRequestError, QueueFullError
from tests.fakes import Harness

LARGE_CACHE = SchedulerConfig(num_blocks=100, block_size=4, max_model_len=20)
SMALL_CACHE = SchedulerConfig(num_blocks=3, block_size=4, max_model_len=100)


@pytest.mark.parametrize(("num_prompt_tokens", "max_tokens"), [(1, 0), (1, 19), (19, 1), (20, 0), (10, 10)])
def test_what_fits_the_context_is_taken(num_prompt_tokens: int, max_tokens: int) -> None:
    check_request(LARGE_CACHE, num_prompt_tokens, max_tokens)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "param", "numbers"),
    [
        (21, 0, "prompt", ["21", "20"]),
        (20, 1, "prompt", ["20"]),
        (500, 5, "prompt", ["500", "20"]),
        (19, 2, "max_tokens", ["19", "2", "20", "at most 1"]),
        (1, 20, "max_tokens", ["20", "at most 19"]),
    ],
)
def test_what_exceeds_the_context_is_refused(
    num_prompt_tokens: int, max_tokens: int, param: str, numbers: list[str]
) -> None:
    with pytest.raises(ContextLengthError) as caught:
        check_request(LARGE_CACHE, num_prompt_tokens, max_tokens)
    assert caught.value.param == param
    assert param in caught.value.message
    assert all(number in caught.value.message for number in numbers)


@pytest.mark.parametrize(("num_prompt_tokens", "max_tokens"), [(12, 0), (12, 1), (1, 12), (6, 7)])
def test_what_fits_the_whole_cache_is_taken_and_served(num_prompt_tokens: int, max_tokens: int) -> None:
    check_request(SMALL_CACHE, num_prompt_tokens, max_tokens)
    harness = Harness(num_blocks=3, block_size=4, max_model_len=100)
    harness.add("a", list(range(num_prompt_tokens)), max_tokens)
    harness.drain()
    assert len(harness.token_ids["a"]) == max_tokens


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "param"), [(13, 0, "prompt"), (12, 2, "max_tokens"), (1, 13, "max_tokens")]
)
def test_what_exceeds_the_whole_cache_is_refused(num_prompt_tokens: int, max_tokens: int, param: str) -> None:
    with pytest.raises(ContextLengthError, match=r"12 tokens \(3 blocks of 4\)") as caught:
        check_request(SMALL_CACHE, num_prompt_tokens, max_tokens)
    assert caught.value.param == param


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="prompt is empty") as caught:
        check_request(LARGE_CACHE, 0, 5)
    assert caught.value.param == "prompt"


def test_the_queue_is_bounded() -> None:
    config = SchedulerConfig(num_blocks=1, max_model_len=1, max_num_seqs=2, max_num_waiting=3)
    check_queue(config, 4)
    check_queue(config, 0, num_new=5)
    for num_unfinished, num_new in ((5, 1), (0, 6), (4, 2)):
        with pytest.raises(QueueFullError, match=f"{num_unfinished} requests are unfinished and at most 5") as caught:
            check_queue(config, num_unfinished, num_new)
        assert caught.value.param == "max_num_waiting"


def test_a_refused_request_leaves_no_trace_and_the_others_go_on() -> None:
    harness = Harness(max_num_seqs=1, max_num_waiting=1)
    harness.add("a", [1, 2])
    harness.add("b", [3])
    harness.step()
    for prompt, error in (([1], QueueFullError), ([], InvalidRequestError), ([1] * 129, ContextLengthError)):
        with pytest.raises(error):
            harness.add("c", prompt)
    assert harness.scheduler.num_unfinished == 2
    harness.drain()
    assert set(harness.finish_reasons) == {"a", "b"}


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("num_blocks", 0),
        ("block_size", 0),
        ("max_model_len", 0),
        ("max_num_seqs", 0),
        ("max_chunk_tokens", 0),
        ("max_num_waiting", -1),
        ("max_num_batched_tokens", 63),
    ],
)
def test_a_limit_out_of_range_is_refused_by_name(param: str, value: int) -> None:
    limits = {"num_blocks": 8, "max_model_len": 64, param: value}
    with pytest.raises(ConfigError, match=rf"^{param} .*{value}") as caught:
        SchedulerConfig(**limits)  # type: ignore[arg-type]
    assert caught.value.param == param
