"""Batches for backends and samplers, made by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shoal.model.step.batch import BIAS, PENALTY, ForwardBatch, SamplingBatch
from shoal.model.step.sampling import sampling_rows


@dataclass
class Paged:
    """Gives sequences blocks at scattered places and builds the batches that compute their tokens."""

    num_blocks: int
    block_size: int
    num_groups: int = 1
    free: list[int] = field(default_factory=list)
    tables: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = np.random.default_rng(7).permutation(self.num_blocks).tolist()

    def release(self, name: str) -> None:
        self.free = self.tables.pop(name) + self.free

    def batch(self, parts: Sequence[tuple[str, Sequence[int], int]], *, all_logits: bool = True) -> ForwardBatch:
        """Each part is (sequence, tokens to compute, position of the first); logits of all tokens or the last ones."""
        for name, tokens, start in parts:
            table = self.tables.setdefault(name, [])
            while len(table) // self.num_groups * self.block_size < start + len(tokens):
                table += [self.free.pop() for _ in range(self.num_groups)]
        positions = [start + i for _, tokens, start in parts for i in range(len(tokens))]
        slots = [
            [
                self.tables[name][position // self.block_size * self.num_groups + group] * self.block_size
                + position % self.block_size
                for name, tokens, start in parts
                for position in range(start, start + len(tokens))
            ]
            for group in range(self.num_groups)
        ]
        ends = np.cumsum([len(tokens) for _, tokens, _ in parts])
        tables = np.zeros((len(parts), max(len(self.tables[name]) for name, _, _ in parts)), np.int32)
        for row, (name, _, _) in enumerate(parts):
            tables[row, : len(self.tables[name])] = self.tables[name]
        return ForwardBatch(
            token_ids=np.array([t for _, tokens, _ in parts for t in tokens], np.int32),
            positions=np.array(positions, np.int32),
            slot_mapping=np.array(slots, np.int32),
            query_start_loc=np.array([0, *ends], np.int32),
            context_lens=np.array([start + len(tokens) for _, tokens, start in parts], np.int32),
            block_tables=tables,
            logits_indices=np.arange(ends[-1], dtype=np.int32) if all_logits else (ends - 1).astype(np.int32),
        )


def sampling_batch(
    num_rows: int,
    *,
    penalties: Iterable[Any] = (),
    biases: Iterable[Any] = (),
    named: Mapping[int, Sequence[int]] | None = None,
    **fields: Any,
) -> SamplingBatch:
    """Greedy rows without any option, except for the given fields; entries are tuples in the order of their fields.

    `named` are the `logprob_token_ids` of rows.
    """
    rows = sampling_rows(num_rows, **{"temperature": 0.0} | fields)
    for row, token_ids in (named or {}).items():
        rows["num_logprobs"][row] = len(token_ids)
        rows["logprob_token_ids"][row, : len(token_ids)] = token_ids
    return SamplingBatch(rows, np.array(list(penalties), PENALTY), np.array(list(biases), BIAS))
