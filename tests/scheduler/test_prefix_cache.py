"""Blocks: which request owns them, which are found again by content, which are evicted first."""

from __future__ import annotations

import pytest

from shoal.scheduler.block_pool import BlockPool
from tests.fakes import Harness, generate, hashed, params


def test_blocks_are_handed_out_once_and_come_back() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(3), pool.allocate(1)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert (pool.num_available, pool.num_owned) == (0, 4)
    pool.check([first, second])
    pool.release(first)
    assert (pool.num_available, pool.num_owned) == (3, 1)
    pool.check([second])


def test_a_shared_block_counts_once_and_is_free_after_its_last_owner() -> None:
    pool = BlockPool(2)
    table = pool.allocate(1)
    pool.publish(table[0], b"content")
    pool.share(table)
    assert pool.num_owned == 1
    pool.check([table, table])
    pool.release(table)
    assert pool.num_owned == 1
    assert not pool.is_evictable(table[0])
    pool.release(table)
    assert pool.num_owned == 0
    assert pool.is_evictable(table[0])
    assert pool.find(b"content") == table[0]
    pool.check([])


def test_blocks_without_content_go_first_then_the_least_recently_released() -> None:
    pool = BlockPool(4)
    old, new, plain = pool.allocate(1), pool.allocate(1), pool.allocate(1)
    pool.publish(old[0], b"old")
    pool.publish(new[0], b"new")
    pool.release(old)
    pool.release(new)
    pool.release(plain)
    assert set(pool.allocate(2)).isdisjoint(old + new)
    assert pool.allocate(1) == old
    assert pool.find(b"old") is None
    assert pool.find(b"new") == new[0]


def test_a_twin_of_known_content_is_not_found_and_does_not_linger() -> None:
    pool = BlockPool(2)
    (first,), (second,) = pool.allocate(1), pool.allocate(1)
    pool.publish(first, b"content")
    pool.publish(second, b"content")
    assert pool.find(b"content") == first
    pool.release([second])
    assert not pool.is_evictable(second)
    pool.check([[first]])


@pytest.mark.parametrize(
    ("tables", "message"), [([], "reference counts"), ([[0], [0]], "reference counts"), ([[1]], "reference counts")]
)
def test_the_check_fails_when_owners_and_counts_differ(tables: list[list[int]], message: str) -> None:
    pool = BlockPool(2)
    assert pool.allocate(1) == [0]
    pool.check([[0]])
    with pytest.raises(AssertionError, match=message):
        pool.check(tables)


def test_the_check_fails_when_a_block_is_lost_or_free_twice() -> None:
    pool = BlockPool(2)
    pool._free.pop()
    with pytest.raises(AssertionError, match="leaked"):
        pool.check([])
    pool._free.append(pool._free[0])
    with pytest.raises(AssertionError, match="free twice"):
        pool.check([])


def test_full_blocks_of_a_prompt_are_found_again() -> None:
    harness = Harness(block_size=4)
    prompt = list(range(10))
    harness.add("a", prompt, max_tokens=1)
    harness.drain()
    harness.add("b", prompt, max_tokens=1)
    harness.drain()
    assert harness.chunks == [[("a", 0, 10)], [("b", 8, 2)]]
    assert harness.first_news["b"].num_cached_tokens == 8
    assert harness.executor.steps[-2][0].blocks[:2] == harness.executor.steps[0][0].blocks[:2]
    stats = harness.scheduler.stats()
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (20, 8)


@pytest.mark.parametrize(("length", "num_cached"), [(1, 0), (3, 0), (4, 3), (5, 4), (8, 7), (9, 8)])
def test_at_least_one_token_is_left_to_compute(length: int, num_cached: int) -> None:
    harness = Harness(block_size=4)
    for request_id in ("a", "b"):
        harness.add(request_id, list(range(length)), max_tokens=1)
        harness.drain()
    assert harness.chunks[-1] == [("b", num_cached, length - num_cached)]
    assert harness.token_ids["a"] == harness.token_ids["b"]


def test_generated_tokens_are_found_too() -> None:
    """The next turn of a conversation starts with prompt and answer of the last."""
    harness = Harness(block_size=4)
    harness.add("a", [1, 2, 3], max_tokens=6)
    harness.drain()
    prompt = [1, 2, 3, *harness.token_ids["a"], 4]
    harness.add("b", prompt, max_tokens=1)
    harness.drain()
    assert harness.chunks[-1] == [("b", 8, 2)]


def test_equal_blocks_after_different_ones_are_not_the_same() -> None:
    harness = Harness(block_size=2)
    harness.add("a", [1, 2, 3, 4, 5], max_tokens=1)
    harness.drain()
    harness.add("b", [6, 7, 8, 9, 5], max_tokens=1)
    harness.drain()
    harness.add("c", [6, 7, 3, 4, 5], max_tokens=1)
    harness.drain()
    assert harness.chunks[-1] == [("c", 2, 3)], "a hash covers all that stands before its block"


def test_prefixes_are_found_with_the_same_salt_only() -> None:
    harness = Harness(block_size=2)
    for request_id, salt in (("a", ""), ("b", "x"), ("c", "y"), ("d", "x"), ("e", "")):
        harness.add(request_id, [1, 2, 3, 4, 5], max_tokens=1, cache_salt=salt)
        harness.drain()
    assert [chunk[0] for chunk in harness.chunks] == [("a", 0, 5), ("b", 0, 5), ("c", 0, 5), ("d", 4, 1), ("e", 4, 1)]
    assert len({tuple(tokens) for tokens in harness.token_ids.values()}) == 1


def test_requests_that_run_together_share_blocks_that_count_once() -> None:
    harness = Harness(num_blocks=8, block_size=4)
    prompt = list(range(13))
    for request_id in ("a", "b"):
        harness.add(request_id, prompt, max_tokens=3)
        harness.step()
    first, second = (share.blocks for share in harness.executor.steps[-1])
    assert first[:3] == second[:3]
    assert first[3] != second[3]
    assert harness.scheduler.kv_cache.pool.num_owned == 5
    assert harness.scheduler.stats().kv_cache_usage == 5 / 8
    harness.abort("a")
    assert harness.scheduler.kv_cache.pool.num_owned == 4
    harness.drain()


def test_equal_prompts_of_one_step_are_computed_apart() -> None:
    harness = Harness(num_blocks=8, block_size=4)
    for request_id in ("a", "b"):
        harness.add(request_id, list(range(9)), max_tokens=2)
    harness.step()
    assert harness.chunks == [[("a", 0, 9), ("b", 0, 9)]]
    harness.drain()
    assert harness.token_ids["a"] == harness.token_ids["b"]
    harness.add("c", list(range(9)), max_tokens=2)
    harness.step()
    assert harness.chunks[-1] == [("c", 8, 1)]
    harness.drain()


def test_nothing_is_found_when_prefix_caching_is_off() -> None:
    harness = Harness(enable_prefix_caching=False)
    for request_id in ("a", "b"):
        harness.add(request_id, list(range(9)), max_tokens=1)
        harness.drain()
    assert harness.chunks[-1] == [("b", 0, 9)]
    assert harness.scheduler.stats().num_prefix_hits == 0


def test_what_an_aborted_request_had_computed_is_found() -> None:
    harness = Harness(block_size=4, max_chunk_tokens=6)
    harness.add("a", list(range(20)))
    harness.step()
    harness.abort("a")
    harness.add("b", list(range(20)), max_tokens=1)
    harness.step()
    assert harness.chunks[-1] == [("b", 4, 6)], "the block that was half full when the request left is not"
    harness.drain()


def test_the_tail_of_a_prefix_is_evicted_before_its_head() -> None:
    harness = Harness(num_blocks=5, block_size=2, max_model_len=10)
    old = list(range(9))
    harness.add("old", old, max_tokens=1)
    harness.drain()
    harness.add("new", [9, 9, 9], max_tokens=1)  # two blocks: the free one, and one that is evicted
    harness.drain()
    harness.add("again", old, max_tokens=1)
    harness.drain()
    assert harness.chunks[-1] == [("again", 6, 3)]


def test_hits_are_not_evicted_to_make_room_for_the_rest_of_the_same_prompt() -> None:
    harness = Harness(num_blocks=4, block_size=2, max_model_len=9)
    harness.add("a", [1, 2, 3, 4, 5], max_tokens=1)
    harness.drain()
    harness.add("b", [1, 2, 3, 4, 5, 6, 7, 8], max_tokens=1)
    harness.drain()
    assert harness.chunks[-1] == [("b", 4, 4)]
    assert harness.token_ids["b"] == generate(hashed(50), "b", [1, 2, 3, 4, 5, 6, 7, 8], params(1))


def test_evictable_hits_are_not_counted_as_room_twice() -> None:
    """Two cached blocks are found and are all that is available: the third must wait for "a"."""
    harness = Harness(num_blocks=4, block_size=2, max_model_len=8)
    harness.add("seed", [1, 2, 3, 4], max_tokens=1)
    harness.drain()
    harness.add("a", [7, 8, 9], max_tokens=2)
    harness.step()
    harness.add("b", [1, 2, 3, 4, 5], max_tokens=1)
    harness.step()
    assert "b" in harness.scheduler.waiting
    harness.drain()
    assert harness.chunks[-1] == [("b", 4, 1)]


def test_a_block_is_computed_again_in_place_only_if_nobody_owns_it() -> None:
    """A prompt that ends with a cached block needs its last token alone, but two requests never write one slot."""
    harness = Harness(block_size=4)
    harness.add("a", list(range(8)), max_tokens=1)
    harness.drain()
    for request_id in ("b", "c"):
        harness.add(request_id, list(range(8)), max_tokens=3)
    harness.drain()
    assert harness.chunks[1] == [("b", 7, 1), ("c", 4, 4)]
    step = next(step for step in harness.executor.steps if len(step) == 2)
    blocks = {share.request_id: share.blocks for share in step}
    assert blocks["b"][0] == blocks["c"][0] and blocks["b"][1] != blocks["c"][1]
    assert harness.token_ids["b"] == harness.token_ids["c"]
