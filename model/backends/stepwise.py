"""Drafting with one call for each token of the longest proposal, for backends that cannot draft in one call."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shoal.model.step.batch import DraftBatch, ForwardBatch, Int32, SamplingBatch


def draft_stepwise(
    choose: Callable[[ForwardBatch, SamplingBatch], Int32], batch: DraftBatch, sampling: SamplingBatch
) -> Int32:
    """Do what `Backend.draft` does; `choose` computes a step and chooses the tokens at its rows of logits."""
    drafted = np.full((len(batch.rows), batch.num_wanted[0]), -1, np.int32)
    token_ids = choose(known_tokens(batch), sampling)
    drafted[:, 0] = token_ids
    for index in range(1, drafted.shape[1]):
        num_more = int((batch.num_wanted > index).sum())
        step = _one_token_each(batch, np.maximum(token_ids[:num_more], 0), index)  # -1 becomes token 0
        token_ids = choose(step, _first_rows(sampling, num_more, index))
        drafted[:num_more, index] = token_ids
    return drafted


def known_tokens(batch: DraftBatch) -> ForwardBatch:
    """The step over the known tokens, with the logits of the last token of each sequence."""
    counts = batch.ends - batch.starts
    query_start_loc = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=query_start_loc[1:])
    # The index of each token in its sequence's share gives its position.
    offsets = np.arange(query_start_loc[-1], dtype=np.int32) - np.repeat(query_start_loc[:-1], counts)
    positions = np.repeat(batch.starts, counts) + offsets
    rows = np.repeat(batch.rows, counts)
    return ForwardBatch(
        token_ids=batch.token_ids[rows, positions],
        positions=positions,
        slot_mapping=_slots(batch, rows, positions),
        query_start_loc=query_start_loc,
        context_lens=batch.ends,
        block_tables=batch.block_tables[batch.rows],
        logits_indices=query_start_loc[1:] - np.int32(1),
    )


def _one_token_each(batch: DraftBatch, token_ids: Int32, index: int) -> ForwardBatch:
    """The step over drafted token `index`, counted from 1, of each of the first sequences."""
    num_seqs = len(token_ids)
    positions = batch.ends[:num_seqs] + np.int32(index - 1)
    every = np.arange(num_seqs + 1, dtype=np.int32)
    return ForwardBatch(
        token_ids=token_ids,
        positions=positions,
        slot_mapping=_slots(batch, batch.rows[:num_seqs], positions),
        query_start_loc=every,
        context_lens=positions + np.int32(1),
        block_tables=batch.block_tables[batch.rows[:num_seqs]],
        logits_indices=every[:-1],
    )


def _slots(batch: DraftBatch, rows: Int32, positions: Int32) -> Int32:
    block_index, offset = np.divmod(positions, np.int32(batch.block_size))
    slots: Int32 = batch.block_tables[rows, block_index] * np.int32(batch.block_size) + offset
    return slots


def _first_rows(sampling: SamplingBatch, num_rows: int, num_later: int) -> SamplingBatch:
    """How to choose for the first rows of `sampling`, `num_later` positions later; penalties stay as they are."""
    rows = sampling.rows[:num_rows].copy()
    rows["position"] += num_later
    penalties, biases = (
        entries[: np.searchsorted(entries["row"], num_rows)] for entries in (sampling.penalties, sampling.biases)
    )
    return SamplingBatch(rows, penalties, biases)
