"""The table of the requests in the batch: what is gathered from it for each row of logits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.model.step.batch import SamplingBatch
from shoal.model.step.rows import BatchRows
from shoal.model.step.sampling import SAMPLING_ROW
from shoal.scheduler.output import NewRequest, SamplingParams, ScheduledRequest
from tests.fakes import params


def joining(
    prompt: list[int], sampling: SamplingParams | None = None, output: list[int] | None = None, *, row: int = 0
) -> ScheduledRequest:
    tokens = prompt + (output or [])
    num_blocks = -(-len(tokens) // 4)
    new = NewRequest(tokens, len(prompt), sampling or params())
    return ScheduledRequest("a", row, 0, len(tokens), list(range(num_blocks)), num_blocks, True, [], new)


def sampling_at(rows: BatchRows, *pairs: tuple[int, int], chooses: bool = True) -> SamplingBatch:
    """What the table says for these (row, position) pairs."""
    row, position = (np.array(column, np.int32) for column in zip(*pairs, strict=True))
    return rows.sampling_batch(row, position, np.full(len(pairs), chooses))


def entries(records: np.ndarray) -> dict[tuple[int, int], Any]:
    found = {(row, token_id): value for row, token_id, value in records.tolist()}
    assert len(found) == len(records), "each (row, token) at most once"
    return found


def penalties(batch: SamplingBatch) -> dict[tuple[int, int], int]:
    return entries(batch.penalties)


def biases(batch: SamplingBatch) -> dict[tuple[int, int], float]:
    return entries(batch.biases)


def test_a_request_that_is_placed_twice_is_there_once() -> None:
    """A step that failed is given again."""
    rows = BatchRows(2, 16, 4)
    asked = params(num_prompt_logprobs=0)
    assert [rows.place(joining(prompt, asked, row=1)) for prompt in ([1, 2], [3])] == [1, 1]
    assert (rows.token_ids[1, 0], rows.num_prompt_tokens.tolist(), rows.scored) == (3, [0, 1], {1: 0})


def test_a_block_table_grows_where_the_share_says() -> None:
    rows = BatchRows(1, 16, 4)
    rows.place(joining(list(range(6))))
    for _ in range(2):  # given twice, it grows once
        rows.place(ScheduledRequest("a", 0, 6, 1, [9], 3, True, [], None))
    assert rows.block_tables[0, :3].tolist() == [0, 1, 9]


def test_drafted_tokens_stand_at_the_end_of_the_share() -> None:
    rows = BatchRows(1, 16, 4)
    rows.place(joining([5, 6, 7]))
    rows.place(ScheduledRequest("a", 0, 2, 3, [], 2, True, [8, 9], None))
    assert rows.token_ids[0, :5].tolist() == [5, 6, 7, 8, 9]


def test_each_row_is_sampled_as_its_own_request_asks() -> None:
    rows = BatchRows(3, 16, 4)
    asked = [
        params(temperature=0.5, top_p=0.25, min_p=0.125, top_k=7, seed=2**64 - 1, num_logprobs=3, xtc_threshold=0.25),
        params(presence_penalty=0.5, frequency_penalty=-1.0, repetition_penalty=1.5, seed=0, xtc_threshold=0.5),
        params(top_n_sigma=1.5, typical_p=0.75, xtc_probability=0.25, xtc_threshold=0.125, logprob_token_ids=(7, 0)),
    ]
    for index, sampling in enumerate(asked):
        rows.place(joining([index], sampling, row=index))
    order = [2, 0, 1, 0]
    batch = sampling_at(rows, *((index, 4 + index) for index in order))
    assert batch.rows.dtype == SAMPLING_ROW
    expected = {name: [getattr(asked[index], name, None) for index in order] for name in batch.rows.dtype.names or ()}
    expected |= {
        "num_logprobs": [2, 3, -1, 3],
        "logprob_token_ids": [[7, 0] + [-1] * 18] + [[-1] * 20] * 3,
        "position": [6, 4, 5, 4],
        "forced_token_id": [-1] * 4,
        "mask": [-1] * 4,
    }
    assert {name: batch.rows[name].tolist() for name in expected} == expected


def test_a_row_that_another_request_takes_is_gathered_again() -> None:
    rows = BatchRows(1, 16, 4)
    for temperature in (0.25, 0.5):
        row = rows.place(joining([1], params(temperature=temperature)))
        assert sampling_at(rows, (row, 1)).rows["temperature"].tolist() == [temperature]
        assert sampling_at(rows, (row, 2)).rows["temperature"].tolist() == [temperature]
        rows.leave(row)


def test_known_tokens_are_forced_where_a_prompt_is_scored() -> None:
    rows = BatchRows(2, 16, 4)
    scored = rows.place(joining([5, 6, 7], params(num_prompt_logprobs=2, logprob_token_ids=(9,))))
    other = rows.place(joining([8, 9], row=1))
    row = np.array([scored, scored, scored, other], np.int32)
    batch = rows.sampling_batch(row, np.array([1, 2, 3, 2], np.int32), np.array([False, False, True, True]))
    assert batch.rows["forced_token_id"].tolist() == [6, 7, -1, -1]
    assert batch.rows["num_logprobs"].tolist() == [2, 2, 1, -1]
    assert batch.rows["logprob_token_ids"][:, 0].tolist() == [-1, -1, 9, -1]
    rows.leave(0)
    assert not rows.scored


@settings(max_examples=50, derandomize=True)
@given(
    prompt=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    output=st.lists(st.integers(0, 5), max_size=8),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
)
def test_penalties_see_what_was_generated_before_the_position(
    prompt: list[int], output: list[int], repetition_penalty: float
) -> None:
    rows = BatchRows(2, 20, 4)
    rows.place(joining([1, 2, 3], row=1))
    asked = params(repetition_penalty=repetition_penalty, frequency_penalty=0.5)
    row = rows.place(joining(prompt, asked, output))
    positions = [len(prompt) + index for index in range(len(output) + 1)]
    batch = sampling_at(rows, (1, 3), *((row, position) for position in positions))
    expected: dict[tuple[int, int], int] = {}
    for index in range(len(positions)):
        if repetition_penalty != 1:
            expected |= {(index + 1, token_id): 0 for token_id in prompt}
        expected |= {(index + 1, token_id): count for token_id, count in Counter(output[:index]).items()}
    assert penalties(batch) == expected


def test_penalties_count_drafted_tokens_before_the_position_and_not_after_it() -> None:
    rows = BatchRows(1, 16, 4)
    row = rows.place(joining([1], params(presence_penalty=1.0), [2]))
    rows.place(ScheduledRequest("a", 0, 1, 3, [], 1, True, [2, 3], None))
    batch = sampling_at(rows, (row, 2), (row, 3), (row, 4))
    assert penalties(batch) == {(0, 2): 1, (1, 2): 2, (2, 2): 2, (2, 3): 1}


@pytest.mark.parametrize("min_tokens", [0, 1, 3])
def test_stop_tokens_are_banned_before_min_tokens(min_tokens: int) -> None:
    rows = BatchRows(1, 16, 4)
    asked = params(min_tokens=min_tokens, stop_token_ids=frozenset({7, 8}), logit_bias={3: 1.5, 8: 100.0})
    row = rows.place(joining([1, 2], asked))
    batch = sampling_at(rows, *((row, 2 + index) for index in range(5)))
    expected: dict[tuple[int, int], float] = {}
    for index in range(5):
        ban = dict.fromkeys((7, 8), -np.inf) if index < min_tokens else {}
        expected |= {(index, token_id): addend for token_id, addend in ({3: 1.5, 8: 100.0} | ban).items()}
    assert biases(batch) == expected


def test_scored_tokens_are_neither_biased_nor_penalised() -> None:
    rows = BatchRows(1, 16, 4)
    asked = params(num_prompt_logprobs=0, logit_bias={3: 1.0}, repetition_penalty=2.0)
    row = rows.place(joining([1, 2, 3], asked))
    batch = sampling_at(rows, (row, 1), (row, 2), chooses=False)
    assert biases(batch) == {}
    assert penalties(batch) == {}


def test_what_a_row_asked_for_leaves_with_it() -> None:
    rows = BatchRows(1, 16, 4)
    asked = params(num_prompt_logprobs=0, logit_bias={3: 1.0}, repetition_penalty=2.0, min_tokens=3)
    rows.place(joining([1, 2, 3], asked))
    rows.leave(0)
    row = rows.place(joining([4, 5, 6]))
    batch = sampling_at(rows, (row, 3))
    assert biases(batch) == {}
    assert penalties(batch) == {}
    assert batch.rows["forced_token_id"].tolist() == [-1]


def test_drafting_and_choosing_keep_their_own_rows() -> None:
    """Rows 1 and 0 as 32-bit numbers are, byte for byte, row 1 as one of 64 bits."""
    rows = BatchRows(2, 16, 4)
    seeds = [7, 8]
    for row, seed in enumerate(seeds):
        rows.place(joining([1], params(seed=seed), row=row))
    chosen = rows.sampling_batch(np.array([1]), np.array([1], np.int32), np.ones(1, np.bool_))
    drafting = rows.drafting_batch(np.array([1, 0], np.int32), np.array([1, 1], np.int32))
    assert chosen.rows["seed"].tolist() == [seeds[1]]
    assert drafting.rows["seed"].tolist() == [seeds[1], seeds[0]]
    assert drafting.rows["num_logprobs"].tolist() == [-1, -1]
