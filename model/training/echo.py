"""Text that the target writes, for a draft to learn from.

In use a draft continues the target's text, not the corpus, so it is distilled on both (Zhou et al. 2023,
"DistillSpec").  The target writes on Shoal's own backend: it continues the beginnings of documents, a batch at a time,
to the same length.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shoal.model.step.batch import Backend, ForwardBatch, Int32, SamplingBatch, UInt64
from shoal.model.step.sampling import sampling_rows

from .tokens import Tokens

NUM_ROWS = {"cpu": 64, "cuda": 4096}  # texts that are written at once
LENGTH = 512  # tokens of a text, including its beginning; fewer if the target's context is shorter
BLOCK_SIZE = 16
_GIVEN = (32, 16, 8, 4)  # batch by batch, a text's length over that of its beginning
_TEMPERATURES = (0.0, 0.8, 0.8, 1.0)  # row by row


def write_echoes(
    create_backend: Callable[[int], Backend],
    tokens: Tokens,
    num_tokens: int,
    *,
    num_rows: int,
    length: int,
    end_of_text: int,
    observe: Callable[[int], None],
) -> Tokens:
    """Continue documents of `tokens` until there are `num_tokens` of text; the batch's number is the seed.

    Args:
        create_backend: makes the target's backend with a given number of blocks of BLOCK_SIZE tokens.
        tokens: documents, each after an `end_of_text`.
        num_rows: texts that are written at once, a multiple of four.
        length: of each text, in tokens, a multiple of BLOCK_SIZE.
        observe: called with the number of tokens so far.

    Returns:
        The texts one after the other, each after an `end_of_text`.
    """
    starts = np.flatnonzero(tokens[: len(tokens) - length] == end_of_text)
    num_batches = -(-num_tokens // (num_rows * length))
    backend = create_backend(num_rows * length // BLOCK_SIZE)
    texts = []
    for number in range(num_batches):
        given = length // _GIVEN[number % len(_GIVEN)]
        chosen = np.random.default_rng(number).choice(starts, num_rows)
        beginnings = tokens[chosen[:, None] + np.arange(given)].astype(np.int32)
        texts.append(_continue(backend, beginnings, length, seed=number))
        observe(min(num_tokens, (number + 1) * num_rows * length))
    return np.concatenate(texts).reshape(-1).astype(np.uint16)


def _continue(backend: Backend, beginnings: Int32, length: int, seed: int) -> Int32:
    """Texts [num_rows, length] that continue `beginnings` [num_rows, given]."""
    num_rows, given = beginnings.shape
    texts = np.zeros((num_rows, length), np.int32)
    texts[:, :given] = beginnings
    seeds = np.arange(num_rows, dtype=np.uint64) + np.uint64(seed * num_rows)
    begin = 0
    for end in range(given, length):
        texts[:, end] = backend.execute(_step(texts, begin, end), _sampling(seeds, end)).token_ids
        begin = end
    return texts


def _step(texts: Int32, begin: int, end: int) -> ForwardBatch:
    """Compute the tokens `begin` to `end` of every text; row r owns the r-th part of the blocks."""
    num_rows, length = texts.shape
    positions = np.arange(begin, end, dtype=np.int32)
    ends = np.arange(num_rows + 1, dtype=np.int32) * np.int32(end - begin)
    return ForwardBatch(
        token_ids=texts[:, begin:end].flatten(),
        positions=np.tile(positions, num_rows),
        slot_mapping=(np.arange(num_rows, dtype=np.int32)[:, None] * np.int32(length) + positions).reshape(1, -1),
        query_start_loc=ends,
        context_lens=np.full(num_rows, end, np.int32),
        block_tables=np.arange(num_rows * length // BLOCK_SIZE, dtype=np.int32).reshape(num_rows, -1),
        logits_indices=ends[1:] - np.int32(1),
    )


def _sampling(seeds: UInt64, position: int) -> SamplingBatch:
    temperature = np.resize(np.array(_TEMPERATURES, np.float32), len(seeds))
    return SamplingBatch(sampling_rows(len(seeds), temperature=temperature, seed=seeds, position=position))
