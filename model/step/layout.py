"""The part of a step's arrays that stays the same while the batch only decodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.model.step.batch import Int32

Intp = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where the tokens and the rows of logits of a step are.

    Attributes:
        rows: [num_seqs], batch row of each request.
        counts: [num_seqs], number of tokens of each request.
        query_start_loc: [num_seqs + 1], request s has the tokens query_start_loc[s] to query_start_loc[s + 1].
        sequences, token_rows: [num_tokens], index of each token's request in the step, and its batch row.
        offsets: [num_tokens], index of each token in its request's share.
        num_logits: number of rows of logits of each request; they belong to the last tokens of its share.
        logits_indices, logits_rows: [sum of num_logits], token and batch row of each row of logits.
        chooses: [sum of num_logits], whether the next token is chosen; otherwise it is known, and only scored.
    """

    rows: Intp
    counts: Int32
    query_start_loc: Int32
    sequences: Intp
    token_rows: Intp
    offsets: Int32
    num_logits: list[int]
    logits_indices: Int32
    logits_rows: Intp
    chooses: NDArray[np.bool_]

    @classmethod
    def of(cls, rows: list[int], counts: list[int], num_chosen: list[int], num_logits: list[int]) -> StepLayout:
        """Lay out a step of requests in `rows` with `counts` tokens each.

        Args:
            num_chosen: how many of each request's last tokens choose the next one.
            num_logits: how many of each request's last tokens need logits, at least `num_chosen`.
        """
        row_of = np.array(rows, np.intp)
        query_start_loc = np.zeros(len(rows) + 1, np.int32)
        query_start_loc[1:] = np.cumsum(counts)
        ends = query_start_loc[1:]
        sequences, offsets = _ranges(np.zeros(len(rows), np.int32), counts)
        logits_sequences, logits_indices = _ranges(ends - np.array(num_logits, np.int32), num_logits)
        return cls(
            rows=row_of,
            counts=np.array(counts, np.int32),
            query_start_loc=query_start_loc,
            sequences=sequences,
            token_rows=row_of[sequences],
            offsets=offsets,
            num_logits=num_logits,
            logits_indices=logits_indices,
            logits_rows=row_of[logits_sequences],
            chooses=logits_indices >= (ends - np.array(num_chosen, np.int32))[logits_sequences],
        )


def _ranges(starts: Int32, counts: list[int]) -> tuple[Intp, Int32]:
    """The values of the ranges [start, start + count), range after range: the index of each value's range, and it."""
    which = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum(counts) - counts
    return which, (starts[which] + np.arange(len(which)) - before[which]).astype(np.int32)
