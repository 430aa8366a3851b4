"""Drafting with one call for each token of the longest proposal, for backends that cannot draft in one call."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shoal.model.step.batch import DraftBatch, ForwardBatch, Int32, SamplingBatch, find_slots


def draft_stepwise(
    choose: Callable[[ForwardBatch, SamplingBatch], Int32], batch: DraftBatch, sampling: SamplingBatch
) -> Int32:
    """Do what `Backend.draft` does; `choose` computes a step and chooses the tokens at its rows of logits."""
    drafted = np.full((len(batch.rows), batch.num_wanted[0]), -1, np.int32)
    drafted[:, 0] = choose(known_tokens(batch), sampling)
    for index in range(1, drafted.shape[1]):
        num_more = int(np.count_nonzero(batch.num_wanted > index))
        ends = batch.ends[:num_more] + index
        step = _step(batch, ends - 1, ends)
        step.token_ids = np.maximum(drafted[:num_more, index - 1], 0)  # -1 becomes token 0
        drafted[:num_more, index] = choose(step, _first_rows(sampling, num_more, index))
    return drafted


def known_tokens(batch: DraftBatch) -> ForwardBatch:
    """The step over the known tokens, with the logits of the last token of each sequence."""
    return _step(batch, batch.starts, batch.ends)


def _step(batch: DraftBatch, starts: Int32, ends: Int32) -> ForwardBatch:
    """The step over the tokens from `starts` to `ends` of the first sequences, with the logits of each last token."""
    counts = ends - starts
    query_start_loc = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=query_start_loc[1:])
    positions = np.arange(query_start_loc[-1], dtype=np.int32) + np.repeat(starts - query_start_loc[:-1], counts)
    rows = np.repeat(batch.rows[: len(counts)], counts)
    return ForwardBatch(
        token_ids=batch.token_ids[rows, positions],
        positions=positions,
        slot_mapping=find_slots(batch.block_tables, rows, positions, batch.block_size, batch.num_groups),
        query_start_loc=query_start_loc,
        context_lens=ends,
        block_tables=batch.block_tables[batch.rows[: len(counts)]],
        logits_indices=query_start_loc[1:] - 1,
    )


def _first_rows(sampling: SamplingBatch, num_rows: int, num_later: int) -> SamplingBatch:
    """How to choose for the first rows of `sampling`, `num_later` positions later; penalties stay as they are."""
    rows = sampling.rows[:num_rows].copy()
    rows["position"] += num_later
    penalties, biases = (
        entries[: entries["row"].searchsorted(num_rows)] for entries in (sampling.penalties, sampling.biases)
    )
    return SamplingBatch(rows, penalties, biases)
