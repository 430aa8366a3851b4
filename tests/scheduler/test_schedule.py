"""Which tokens a step computes, as exact lists of (request id, start, num_tokens)."""

from __future__ import annotations

import pytest

from shoal.scheduler.invariants import check_invariants
from shoal.scheduler.output import FinishReason
from tests.fakes import Harness, generate, hashed, params, scripted


def test_one_request_computes_its_prompt_and_then_token_by_token() -> None:
    harness = Harness(scripted({"a": [1, 2, 3, 7, 8, 9]}))
    harness.add("a", [1, 2, 3], max_tokens=3)
    harness.drain()
    assert harness.chunks == [[("a", 0, 3)], [("a", 3, 1)], [("a", 4, 1)]]
    assert harness.token_ids["a"] == [7, 8, 9]
    assert harness.finish_reasons["a"] is FinishReason.LENGTH


def test_a_long_prompt_is_computed_in_chunks_and_samples_only_after_the_last() -> None:
    harness = Harness(max_chunk_tokens=4)
    harness.add("a", list(range(10)), max_tokens=2)
    assert harness.step() == []
    assert harness.step() == []
    assert [len(news.token_ids) for news in harness.step()] == [1]
    harness.drain()
    assert harness.chunks == [[("a", 0, 4)], [("a", 4, 4)], [("a", 8, 2)], [("a", 10, 1)]]


def test_prefill_and_decode_share_a_step_under_one_budget() -> None:
    harness = Harness(max_num_batched_tokens=8, enable_prefix_caching=False)
    harness.add("a", [1, 2, 3], max_tokens=4)
    harness.step()
    harness.add("b", list(range(10)), max_tokens=2)
    harness.add("c", [5, 6], max_tokens=2)
    harness.drain()
    assert harness.chunks == [
        [("a", 0, 3)],
        [("a", 3, 1), ("b", 0, 7)],
        [("a", 4, 1), ("b", 7, 3), ("c", 0, 2)],
        [("a", 5, 1), ("b", 10, 1), ("c", 2, 1)],
    ]


def test_a_step_that_spends_its_budget_leaves_the_rest_for_the_next() -> None:
    harness = Harness(max_num_batched_tokens=4, max_num_seqs=4)
    harness.add("a", list(range(6)), max_tokens=1)
    harness.add("b", [1, 2, 3], max_tokens=1)
    harness.drain()
    assert harness.chunks == [[("a", 0, 4)], [("a", 4, 2), ("b", 0, 2)], [("b", 2, 1)]]


def test_requests_are_admitted_in_the_order_of_arrival_as_rows_become_free() -> None:
    harness = Harness(max_num_seqs=2)
    for request_id, max_tokens in (("a", 1), ("b", 3), ("c", 1), ("d", 1)):
        harness.add(request_id, [1], max_tokens)
    harness.drain()
    assert [[share[0] for share in step] for step in harness.chunks] == [["a", "b"], ["b", "c"], ["b", "d"]]


def test_no_request_overtakes_one_that_waits_for_blocks() -> None:
    harness = Harness(num_blocks=4, block_size=4, max_model_len=16, enable_prefix_caching=False)
    harness.add("a", [1] * 9, max_tokens=2)  # three blocks
    harness.step()
    harness.add("large", [2] * 8, max_tokens=1)
    harness.add("small", [3], max_tokens=1)
    harness.step()
    assert harness.scheduler.stats().num_waiting == 2, "one block is free, but the small request came later"
    harness.drain()
    assert harness.chunks[-1] == [("large", 0, 8), ("small", 0, 1)]


def test_a_request_takes_blocks_as_it_grows() -> None:
    harness = Harness(block_size=2, enable_prefix_caching=False)
    request = harness.add("a", [1, 2, 3], max_tokens=4)
    tables = []
    while not harness.finish_reasons:
        harness.step()
        tables.append(len(harness.executor.steps[-1][0].blocks))
    assert tables == [2, 2, 3, 3]
    assert request.block_ids == []


def test_max_tokens_0_computes_the_prompt_and_ends() -> None:
    harness = Harness(max_chunk_tokens=3)
    harness.add("a", [1, 2, 3, 4, 5], max_tokens=0)
    harness.drain()
    assert harness.chunks == [[("a", 0, 3)], [("a", 3, 2)]]
    assert harness.token_ids["a"] == []
    assert harness.finish_reasons["a"] is FinishReason.LENGTH


@pytest.mark.parametrize("position", [0, 1, 3])
def test_a_stop_token_ends_a_request_and_is_delivered(position: int) -> None:
    output = [5, 6, 7, 8]
    harness = Harness(scripted({"a": [1, *output]}))
    harness.add("a", [1], max_tokens=4, stop_token_ids=frozenset({output[position], 99}))
    harness.drain()
    assert harness.token_ids["a"] == output[: position + 1]
    assert harness.finish_reasons["a"] is FinishReason.STOP, "also where max_tokens is reached at once"


def test_a_stop_token_in_the_prompt_ends_nothing() -> None:
    harness = Harness(scripted({"a": [9, 9, 1, 2]}))
    harness.add("a", [9, 9], max_tokens=2, stop_token_ids=frozenset({9}))
    harness.drain()
    assert harness.token_ids["a"] == [1, 2]


def test_a_request_that_comes_with_output_goes_on_where_it_stood() -> None:
    alone = generate(hashed(50), "a", [1, 2, 3], params(6))
    harness = Harness()
    request = harness.add("a", [1, 2, 3], max_tokens=6)
    harness.scheduler.abort("a")
    request = type(request)("a", [1, 2, 3], params(6), 0.0, output_token_ids=alone[:2])
    harness.scheduler.add(request)
    harness.drain()
    assert harness.token_ids["a"] == alone[2:]
    assert harness.chunks[0] == [("a", 0, 5)]


def test_an_idle_engine_asks_the_executor_for_nothing() -> None:
    harness = Harness()
    assert harness.step() == []
    harness.add("a", [1], max_tokens=1)
    harness.drain()
    num_calls = len(harness.executor.steps)
    harness.step()
    assert len(harness.executor.steps) == num_calls
    assert harness.executor.released[-1] == [0], "the last call let the executor forget the request"


def test_the_first_news_tell_how_long_the_request_queued() -> None:
    harness = Harness(max_num_seqs=1, enable_prefix_caching=False)
    harness.add("a", [1], max_tokens=3)
    harness.add("b", [2], max_tokens=2)
    harness.drain()
    assert harness.first_news["a"].queue_time == 0
    assert harness.first_news["b"].queue_time == 3


def test_abort_while_waiting() -> None:
    harness = Harness(max_num_seqs=1)
    harness.add("a", [1])
    harness.add("b", [2])
    harness.step()
    harness.abort("b")
    harness.drain()
    assert harness.finish_reasons == {"a": FinishReason.LENGTH, "b": FinishReason.ABORT}
    assert "b" not in {share.request_id for step in harness.executor.steps for share in step}


def test_abort_while_running_frees_the_blocks_at_once() -> None:
    harness = Harness()
    harness.add("a", list(range(20)))
    harness.step()
    assert harness.free_blocks < harness.config.num_blocks
    harness.abort("a")
    assert harness.free_blocks == harness.config.num_blocks
    harness.step()
    assert harness.executor.released[-1] == [0]
    harness.drain()


def test_abort_between_schedule_and_update_is_passed_over() -> None:
    harness = Harness()
    harness.add("a", [1, 2])
    harness.add("b", [3, 4])
    output = harness.scheduler.schedule(harness.now)
    result = harness.executor.execute(output)
    harness.abort("a")
    for news in harness.scheduler.update(output, result, harness.now):
        harness.take(news)
    check_invariants(harness.scheduler)
    assert len(harness.token_ids["b"]) == 1
    harness.drain()
    assert harness.finish_reasons == {"a": FinishReason.ABORT, "b": FinishReason.LENGTH}
    assert harness.token_ids["a"] == []


def test_abort_of_an_unknown_or_finished_request_is_none() -> None:
    harness = Harness()
    harness.add("a", [1], max_tokens=1)
    harness.drain()
    assert harness.scheduler.abort("a") is None
    assert harness.scheduler.abort("never") is None


def test_stats_tell_what_is_there() -> None:
    harness = Harness(num_blocks=8, block_size=4, max_num_seqs=1)
    harness.add("a", [1] * 10)
    harness.add("b", [2])
    harness.step()
    stats = harness.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_preemptions) == (1, 1, 0)
    assert stats.kv_cache_usage == 3 / 8
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (10, 0)
    assert (stats.num_deferred, stats.num_steps, stats.num_step_tokens) == (0, 1, 10)
    harness.drain()
    stats = harness.scheduler.stats()
    assert stats.kv_cache_usage == 0
    steps = [step for step in harness.executor.steps if step]  # in the last one a request only left
    num_tokens = sum(share.num_tokens for step in steps for share in step)
    assert (stats.num_steps, stats.num_step_tokens) == (len(steps), num_tokens)
