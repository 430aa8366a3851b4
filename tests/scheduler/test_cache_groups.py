"""Cache groups: layers that see a window or a chunk give blocks back, and prefixes are found without them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.scheduler.admission import check_request
from shoal.scheduler.config import CacheGroup, SchedulerConfig
from shoal.scheduler.errors import ContextLengthError
from shoal.scheduler.step_record import StepRecord
from tests.fakes import Harness, generate, hashed, params

ALL, WINDOW, CHUNK = CacheGroup(), CacheGroup(window=6), CacheGroup(chunk=8)


def tables(harness: Harness, request_id: str) -> list[list[int]]:
    """The block table of each group as the scheduler has it after the last step."""
    block_ids = harness.scheduler.running[request_id].block_ids
    num_groups = len(harness.config.cache_groups)
    return [block_ids[group::num_groups] for group in range(num_groups)]


def num_back(harness: Harness, request_id: str) -> list[int]:
    """How many leading blocks of each table went back."""
    counts = []
    for table in tables(harness, request_id):
        counts.append(table.count(-1))
        assert table[: counts[-1]] == [-1] * counts[-1], "holes after the first block that is left"
    return counts


def lose(harness: Harness, *block_ids: int) -> None:
    """Evict these blocks."""
    pool = harness.scheduler.kv_cache.pool
    for block_id in block_ids:
        del pool._block_of[pool._hash_of.pop(block_id)], pool._evictable[block_id]
        pool._free.append(block_id)


@given(
    group=st.builds(CacheGroup, window=st.integers(0, 9), chunk=st.integers(0, 9)),
    position=st.integers(0, 50),
)
def test_what_a_query_sees(group: CacheGroup, position: int) -> None:
    def sees(key: int) -> bool:
        is_near = not group.window or position - key < group.window
        return is_near and (not group.chunk or key // group.chunk == position // group.chunk)

    assert group.first_seen(position) == min(key for key in range(position + 1) if sees(key))
    assert group.first_seen(position) <= group.first_seen(position + 1)
    assert group.sees_all == (group.window == group.chunk == 0)


@given(
    group=st.builds(CacheGroup, window=st.integers(0, 30), chunk=st.integers(0, 30)),
    size=st.integers(1, 9),
    most=st.integers(1, 20),
    num_tokens=st.integers(1, 100),
    data=st.data(),
)
def test_the_most_blocks_at_once_suffice_for_any_chunks(
    group: CacheGroup, size: int, most: int, num_tokens: int, data: st.DataObject
) -> None:
    """Each chunk needs the blocks from those that its first query sees, or the one before it, up to its end."""
    start = 0
    while start < num_tokens:
        end = min(num_tokens, start + data.draw(st.integers(1, most)))
        first = group.first_seen(max(start - 1, 0)) // size
        assert group.num_unseen(start, size) == first
        assert -(-end // size) - first <= group.most_blocks(num_tokens, size, most) <= -(-num_tokens // size)
        start = end


def test_a_window_gives_blocks_back_while_a_prompt_is_computed_and_while_text_is_generated() -> None:
    harness = Harness(groups=[ALL, WINDOW], num_blocks=30, block_size=4, max_chunk_tokens=8)
    harness.add("a", list(range(20)), max_tokens=20)
    pool = harness.scheduler.kv_cache.pool
    seen = []
    while harness.scheduler.num_unfinished:
        harness.step()
        if "a" in harness.scheduler.running:
            request = harness.scheduler.running["a"]
            # The last computed token may be computed again, and sees the six positions up to its own.
            assert num_back(harness, "a") == [0, max(request.num_computed_tokens - 6, 0) // 4]
            seen.append((request.num_computed_tokens, pool.num_owned))
    assert seen[:3] == [(8, 4), (16, 6), (20, 7)]
    assert seen[-1] == (38, 10 + 2)
    assert max(owned for _, owned in seen) <= harness.config.most_blocks(39)
    harness.drain()
    assert harness.token_ids["a"] == generate(hashed(50), "a", list(range(20)), params(20))


def test_a_chunk_gives_all_its_blocks_back_at_once() -> None:
    harness = Harness(groups=[CHUNK], num_blocks=30, block_size=4, max_chunk_tokens=8)
    harness.add("a", list(range(3)), max_tokens=30)
    counts = []
    for _ in range(24):
        harness.step()
        counts.append((harness.scheduler.running["a"].num_computed_tokens, *num_back(harness, "a")))
    # Token 8 begins a chunk; when it is computed, nothing sees the eight tokens before it.
    assert [counts[0], *(after for before, after in pairwise(counts) if after[1] != before[1])] == [
        (3, 0),
        (9, 2),
        (17, 4),
        (25, 6),
    ]
    harness.drain()


def test_blocks_that_went_back_serve_others_at_once() -> None:
    """Six blocks hold what both requests see, and not what they computed."""
    harness = Harness(groups=[CacheGroup(window=4)], num_blocks=6, block_size=4, max_chunk_tokens=4)
    for request_id in "ab":
        harness.add(request_id, list(range(30)), max_tokens=20)
    for _ in range(8):
        harness.step()
    assert all(len(request.block_ids) == 8 for request in harness.scheduler.running.values())
    harness.drain()
    assert harness.scheduler.stats().num_preemptions == 0
    for request_id in "ab":
        assert harness.token_ids[request_id] == generate(hashed(50), request_id, list(range(30)), params(20))


def test_a_prompt_that_is_half_computed_keeps_its_promise() -> None:
    """The first prompt needs ten blocks of the eleven; the second one waits, although few are owned at first."""
    harness = Harness(groups=[ALL, WINDOW], num_blocks=11, block_size=4, max_chunk_tokens=4)
    harness.add("a", list(range(24)), max_tokens=1)
    harness.add("b", list(range(50, 54)), max_tokens=1)
    harness.step()
    assert harness.scheduler.kv_cache.pool.num_owned == 2
    assert harness.scheduler.kv_cache.num_promised == harness.config.most_blocks(24) - 2 == 8
    assert "b" in harness.scheduler.waiting
    harness.drain()
    assert harness.scheduler.stats().num_preemptions == 0


def test_a_generating_request_is_promised_no_more_than_its_next_blocks() -> None:
    harness = Harness(groups=[ALL, WINDOW], num_blocks=64, block_size=4, max_chunk_tokens=32)
    harness.add("a", list(range(40)), max_tokens=20)
    promised = []
    for _ in range(10):
        harness.step()
        promised.append(harness.scheduler.kv_cache.num_promised)
    assert promised[0] > 2
    assert max(promised[1:]) <= 2
    harness.drain()


@pytest.mark.parametrize("num_shared", [9, 17, 18, 21])
def test_a_prefix_is_found_by_what_the_query_after_it_sees(num_shared: int) -> None:
    harness = Harness(groups=[ALL, WINDOW, CHUNK], num_blocks=64, block_size=4)
    harness.add("a", list(range(22)), max_tokens=1)
    harness.drain()
    prompt = [*range(num_shared), 90, 91]
    harness.add("b", prompt, max_tokens=6)
    harness.step()
    num_found = num_shared // 4 * 4
    assert harness.chunks[-1] == [("b", num_found, len(prompt) - num_found)]
    assert harness.first_news["b"].num_cached_tokens == num_found
    seen = [0, (num_found - 5) // 4, num_found // 8 * 2]
    joined = harness.executor.steps[-1][0].blocks
    assert [joined[group::3].count(-1) for group in range(3)] == seen
    assert all(-1 not in joined[group::3][count:] for group, count in enumerate(seen))
    harness.drain()
    assert harness.token_ids["b"] == generate(hashed(50), "b", prompt, params(6))


def test_a_prefix_whose_window_was_evicted_is_shorter() -> None:
    harness = Harness(groups=[CacheGroup(window=4)], num_blocks=64, block_size=4)
    prompt = list(range(25))
    harness.add("a", prompt, max_tokens=1)
    harness.drain()
    # The third and the sixth block are lost: each prefix needs only the block before its end.
    blocks = harness.executor.steps[0][0].blocks
    lose(harness, blocks[2], blocks[5])
    harness.add("b", prompt, max_tokens=1)
    harness.step()
    assert harness.chunks[-1] == [("b", 20, 5)]
    harness.drain()
    harness.add("c", prompt[:14], max_tokens=1)
    harness.step()
    assert harness.chunks[-1] == [("c", 8, 6)]
    harness.drain()


def test_a_block_of_one_group_is_never_found_for_another() -> None:
    """Both groups see all, and one has lost a block: the prefix ends before it for both."""
    harness = Harness(groups=[ALL, ALL], num_blocks=64, block_size=4)
    prompt = list(range(17))
    harness.add("a", prompt, max_tokens=1)
    harness.drain()
    lose(harness, harness.executor.steps[0][0].blocks[2 * 2 + 1])
    harness.add("b", prompt, max_tokens=1)
    harness.step()
    assert harness.chunks[-1] == [("b", 8, 9)]
    harness.drain()


@pytest.mark.parametrize("groups", [[ALL, WINDOW], [CHUNK], [WINDOW, ALL, CHUNK]])
def test_a_prompt_that_reads_all_is_computed_whole(groups: list[CacheGroup]) -> None:
    harness = Harness(groups=groups, num_blocks=64, block_size=4)
    for request_id in "ab":
        harness.add(request_id, list(range(20)), max_tokens=1, num_logprobs=0, num_prompt_logprobs=0)
        harness.drain()
    assert harness.chunks[-1] == [("b", 0, 20)]
    assert len(harness.prompt_logprobs["b"]) == 19


def test_the_largest_request_is_served_alone_and_no_larger_one_is_taken() -> None:
    groups = (ALL, WINDOW, CHUNK)
    config = SchedulerConfig(num_blocks=20, block_size=4, max_model_len=200, max_chunk_tokens=4, cache_groups=groups)
    # A window of 6 and a chunk of 4 stand in 4 blocks at most, a run of 8 and a chunk of 4 in 4.
    assert config.capacity == (20 - 4 - 4) * 4
    for num_prompt_tokens, max_tokens in ((48, 1), (10, 39), (48, 0)):
        check_request(config, num_prompt_tokens, max_tokens)
        limits = {"num_blocks": 20, "block_size": 4, "max_model_len": 200, "max_chunk_tokens": 4}
        harness = Harness(groups=groups, **limits)
        harness.add("a", list(range(num_prompt_tokens)), max_tokens)
        harness.drain()
        assert len(harness.token_ids["a"]) == max_tokens
        assert harness.scheduler.stats().num_preemptions == 0
    for num_prompt_tokens, max_tokens, param in ((49, 0, "prompt"), (48, 2, "max_tokens")):
        with pytest.raises(ContextLengthError, match="48 tokens") as caught:
            check_request(config, num_prompt_tokens, max_tokens)
        assert caught.value.param == param


def test_a_model_of_windows_alone_serves_any_length_in_few_blocks() -> None:
    harness = Harness(groups=[WINDOW], num_blocks=4, block_size=4, max_chunk_tokens=4, max_model_len=128)
    assert harness.config.capacity == 128
    harness.add("a", list(range(100)), max_tokens=28)
    harness.drain()
    assert harness.token_ids["a"] == generate(hashed(50), "a", list(range(100)), params(28))


def test_a_preempted_request_finds_what_is_left_of_it() -> None:
    harness = Harness(groups=[ALL, WINDOW], num_blocks=20, block_size=4, max_chunk_tokens=8)
    for request_id in "ab":
        harness.add(request_id, [*range(20), ord(request_id)], max_tokens=30)
    harness.drain()
    assert harness.scheduler.stats().num_preemptions > 0
    for request_id in "ab":
        prompt = [*range(20), ord(request_id)]
        assert harness.token_ids[request_id] == generate(hashed(50), request_id, prompt, params(30))


def test_the_record_of_a_step_counts_filled_slots_in_all_groups() -> None:
    harness = Harness(groups=[ALL, WINDOW], num_blocks=30, block_size=4, max_chunk_tokens=7)
    records: list[StepRecord] = []
    harness.engine.observers = [records.append]
    harness.add("a", list(range(20)), max_tokens=10)
    harness.drain()
    computed = [(record.shares[0], record) for record in records if record.shares]
    assert len(computed) == 12
    for share, record in computed:
        start, end = share.num_computed_tokens, share.num_computed_tokens + share.num_scheduled_tokens
        num_back = max(start - 6, 0) // 4
        assert record.num_kv_tokens == 2 * end - 4 * num_back
        assert record.num_used_blocks >= 2 * -(-end // 4) - num_back


def test_rejected_tokens_do_not_move_the_window() -> None:
    """Four drafted tokens, all wrong, are computed in each step; blocks go back by the tokens that stay."""
    harness = Harness(draft=lambda _, context: [60, 61, 62, 63], groups=[WINDOW], num_blocks=30, block_size=2)
    harness.add("a", list(range(5)), max_tokens=20)
    for _ in range(15):
        harness.step()
        request = harness.scheduler.running["a"]
        assert num_back(harness, "a") == [max(request.num_computed_tokens - 6, 0) // 2]
    harness.drain()
    assert harness.token_ids["a"] == generate(hashed(50), "a", list(range(5)), params(20))


def test_looking_ahead_takes_whole_rows_of_blocks_and_no_promised_ones() -> None:
    limits = {"num_blocks": 15, "block_size": 4, "max_chunk_tokens": 4, "num_lookahead_tokens": 8}
    harness = Harness(groups=[ALL, WINDOW], **limits)
    harness.add("a", list(range(24)), max_tokens=16)
    while harness.scheduler.num_unfinished:
        harness.step()
        kv_cache = harness.scheduler.kv_cache
        assert kv_cache.num_promised <= kv_cache.pool.num_available
        assert all(len(request.block_ids) % 2 == 0 for request in harness.scheduler.running.values())
    harness.drain()


def test_padding_computes_its_last_position_again_in_blocks_that_it_owns() -> None:
    harness = Harness(
        groups=[WINDOW, CHUNK], policy="static", num_blocks=64, block_size=2, max_num_seqs=2, max_chunk_tokens=8
    )
    harness.add("a", list(range(7)), max_tokens=2)  # its last position begins a chunk
    harness.add("b", list(range(3)), max_tokens=20)
    harness.drain()
    assert len(harness.token_ids["b"]) == 20
