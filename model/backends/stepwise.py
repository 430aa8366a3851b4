"""Drafting with a call for each token of the longest proposal: for backends that cannot do it in one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from model.batch import ForwardBatch, Int32, SamplingBatch


def draft_stepwise(
    choose: Callable[[ForwardBatch, SamplingBatch], Int32],
    batch: ForwardBatch,
    sampling: SamplingBatch,
    num_wanted: Int32,
    block_size: int,
) -> Int32:
    """Do what `Backend.draft` does with a call of `choose` for each token of the longest proposal."""
    width = int(num_wanted[0])
    drafted = np.full((len(num_wanted), width), -1, np.int32)
    token_ids = choose(batch, sampling)
    drafted[:, 0] = token_ids
    positions = batch.positions[batch.logits_indices]
    for index in range(1, width):
        num_more = int((num_wanted > index).sum())
        positions = positions[:num_more] + np.int32(1)
        tables = batch.block_tables[:num_more]
        block_index, offset = np.divmod(positions, block_size)
        every = np.arange(num_more + 1, dtype=np.int32)
        step = ForwardBatch(
            token_ids=np.maximum(token_ids[:num_more], 0),  # a row without an answer goes on with some token
            positions=positions,
            slot_mapping=tables[every[:-1], block_index] * block_size + offset,
            query_start_loc=every,
            context_lens=positions + np.int32(1),
            block_tables=tables,
            logits_indices=every[:-1],
        )
        token_ids = choose(step, first_rows(sampling, num_more, index))
        drafted[:num_more, index] = token_ids
    return drafted


def first_rows(sampling: SamplingBatch, num_rows: int, num_later: int) -> SamplingBatch:
    """How to choose for the first rows of `sampling`, as many positions later; penalties stay what they were."""
    num_penalties = int(np.searchsorted(sampling.penalty_rows, num_rows))
    num_biases = int(np.searchsorted(sampling.bias_rows, num_rows))
    return SamplingBatch(
        temperature=sampling.temperature[:num_rows],
        top_k=sampling.top_k[:num_rows],
        top_p=sampling.top_p[:num_rows],
        min_p=sampling.min_p[:num_rows],
        presence_penalty=sampling.presence_penalty[:num_rows],
        frequency_penalty=sampling.frequency_penalty[:num_rows],
        repetition_penalty=sampling.repetition_penalty[:num_rows],
        seeds=sampling.seeds[:num_rows],
        positions=sampling.positions[:num_rows] + num_later,
        forced_token_ids=sampling.forced_token_ids[:num_rows],
        num_logprobs=sampling.num_logprobs[:num_rows],
        penalty_rows=sampling.penalty_rows[:num_penalties],
        penalty_token_ids=sampling.penalty_token_ids[:num_penalties],
        penalty_counts=sampling.penalty_counts[:num_penalties],
        bias_rows=sampling.bias_rows[:num_biases],
        bias_token_ids=sampling.bias_token_ids[:num_biases],
        bias=sampling.bias[:num_biases],
    )
