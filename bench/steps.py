"""Steps for a backend, the weights of experts that they read, and times of several kinds of work in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from shoal.model.record import ModelConfig
from shoal.model.step.batch import ForwardBatch, Int32, SamplingBatch
from shoal.model.step.sampling import sampling_rows

BLOCK_SIZE = 16
T = TypeVar("T")


def in_turns(
    works: Sequence[Callable[[], T]], num_turns: int, *, in_a_row: int = 1, pause: float = 0.0
) -> list[list[T]]:
    """Return what each kind of work returns in all turns, so that other load on the machine slows all kinds alike.

    Args:
        in_a_row: results of each kind in a turn.  One more call before them fills the CPU's caches.
        pause: seconds before each kind, in which the threads of the one before stop spinning.
    """
    results: list[list[T]] = [[] for _ in works]
    for _ in range(num_turns):
        for work, found in zip(works, results, strict=True):
            time.sleep(pause)
            work()
            found += [work() for _ in range(in_a_row)]
    return results


def seconds(work: Callable[[], object]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def block_tables(num_seqs: int, blocks_per_seq: int) -> Int32:
    """Return block tables in which each sequence has its own blocks, [num_seqs, blocks_per_seq]."""
    return np.arange(num_seqs * blocks_per_seq, dtype=np.int32).reshape(num_seqs, blocks_per_seq)


def equal_shares(
    token_ids: Int32, start: int, blocks_per_seq: int, num_logits: int | None = None
) -> tuple[ForwardBatch, SamplingBatch]:
    """Return a step with as many tokens of each sequence, and greedy choice.

    Args:
        token_ids: [num_seqs, number of tokens of each].
        start: position of the first of them.
        num_logits: of the last tokens; None is all.
    """
    num_seqs, each = token_ids.shape
    positions = np.arange(start, start + each, dtype=np.int32)
    tables = block_tables(num_seqs, blocks_per_seq)
    slots = tables[:, positions // BLOCK_SIZE] * np.int32(BLOCK_SIZE) + positions % BLOCK_SIZE
    first = 0 if num_logits is None else token_ids.size - num_logits
    batch = ForwardBatch(
        token_ids=token_ids.flatten(),
        positions=np.tile(positions, num_seqs),
        slot_mapping=slots.flatten(),
        query_start_loc=np.arange(0, token_ids.size + 1, each, dtype=np.int32),
        context_lens=np.full(num_seqs, start + each, np.int32),
        block_tables=tables,
        logits_indices=np.arange(first, token_ids.size, dtype=np.int32),
    )
    return batch, greedy(token_ids.size - first)


def greedy(num_logits: int) -> SamplingBatch:
    """Return the greedy choice at each row of logits."""
    return SamplingBatch(sampling_rows(num_logits, temperature=0))


def expert_weights(config: ModelConfig, num_tokens: float) -> float:
    """Return the number of expert weights that a step of `num_tokens` tokens reads if the router chooses evenly."""
    if not config.num_experts:
        return 0.0
    touched: float = config.num_experts * (1 - (1 - config.num_experts_per_tok / config.num_experts) ** num_tokens)
    return config.num_layers * touched * 3 * config.intermediate_size * config.hidden_size
