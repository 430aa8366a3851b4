"""The part of a step's arrays that does not depend on how far its requests have come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.model.step.batch import Int32

Intp = NDArray[np.intp]

_MOST_KEPT = 4


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where the tokens and the logits of a step lie.

    Attributes:
        rows: [num_seqs], batch row of each request.
        counts: [num_seqs], its number of tokens.
        query_start_loc: [num_seqs + 1], its tokens.
        sequences, token_rows: [num_tokens], each token's request, counted from 0, and that request's batch row.
        offsets: [num_tokens], each token's place in its request's share.
        num_logits: logits rows of each request; they belong to the last tokens of its share.
        logits_indices, logits_rows: [sum of num_logits], token and batch row of each logits row.
        chooses: [sum of num_logits], whether the next token is to be chosen, or is known and to be scored.
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
            num_logits: how many of them need logits, those that choose included.
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


class Layouts:
    """Those of the last steps: a batch that only decodes has the same in every step, or one of a few if it verifies."""

    def __init__(self) -> None:
        self._kept: list[tuple[tuple[list[int], ...], StepLayout]] = []  # the newest last

    def of(self, rows: list[int], counts: list[int], num_chosen: list[int], num_logits: list[int]) -> StepLayout:
        """As `StepLayout.of`."""
        key = rows, counts, num_chosen, num_logits
        for known, layout in reversed(self._kept):
            if known == key:
                return layout
        del self._kept[: 1 - _MOST_KEPT]
        self._kept.append((key, StepLayout.of(*key)))
        return self._kept[-1][1]


def _ranges(starts: Int32, counts: list[int]) -> tuple[Intp, Int32]:
    """The ranges [start, start + count), one after the other: which range each value is of, and the value."""
    which = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum(counts) - counts
    return which, (starts[which] + np.arange(len(which)) - before[which]).astype(np.int32)
