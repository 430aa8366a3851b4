"""What a backend is asked to compute: index arrays for one variable-length step, and how to choose the tokens.

All arrays are numpy, C-contiguous, and valid only during the call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.model.step.masks import Masks

Int32 = NDArray[np.int32]
UInt64 = NDArray[np.uint64]
Float32 = NDArray[np.float32]
Records = NDArray[np.void]


@dataclass(slots=True)
class ForwardBatch:
    """One step over `num_seqs` sequences and `num_tokens` tokens.

    Prefill chunks, single tokens and drafted tokens are all queries of a sequence.

    Attributes:
        token_ids: [num_tokens], sequence after sequence.
        positions: [num_tokens], index of each token in its sequence.
        slot_mapping: [num_groups, num_tokens], slot of each token's keys and values in each cache group:
            block_id * block_size + offset.
        query_start_loc: [num_seqs + 1], sequence s owns tokens query_start_loc[s] to query_start_loc[s + 1].
        context_lens: [num_seqs], tokens of the sequence in the KV cache after this step.
        block_tables: [num_seqs, max_blocks * num_groups], block ids; block i of group g stands at i * num_groups + g.
            What no query of the step sees is never read: there an entry is any block's id, or -1.
        logits_indices: [num_logits], tokens whose logits are needed, ascending.
        hidden: [num_tokens, hidden_size], where the hidden states after the last norm are written to; None if nobody
            asks for them.
        inputs: [num_tokens, hidden_size], what the first layer reads; None for the tokens' embeddings.
    """

    token_ids: Int32
    positions: Int32
    slot_mapping: Int32
    query_start_loc: Int32
    context_lens: Int32
    block_tables: Int32
    logits_indices: Int32
    hidden: Float32 | None = None
    inputs: Float32 | None = None


# A token with a penalty at a row of logits.  It was generated `count` times; with 0 it stands in the prompt only.
PENALTY = np.dtype([("row", np.int32), ("token_id", np.int32), ("count", np.int32)])
# An addend to the logit of a token at a row of logits; -inf bans the token.
BIAS = np.dtype([("row", np.int32), ("token_id", np.int32), ("addend", np.float32)])
NO_PENALTIES, NO_BIASES = np.empty(0, PENALTY), np.empty(0, BIAS)


@dataclass(slots=True)
class SamplingBatch:
    """How to choose a token at each of the `num_logits` rows.  `model/step/sampling.py` specifies the choice exactly.

    Attributes:
        rows: [num_logits] SAMPLING_ROW, which `model/step/sampling.py` defines.
        penalties: [any] PENALTY, rows ascending, each (row, token) at most once.
        biases: [any] BIAS, rows ascending.
        masks: those that rows name; None if no row does.
    """

    rows: Records
    penalties: Records = field(default_factory=lambda: NO_PENALTIES)
    biases: Records = field(default_factory=lambda: NO_BIASES)
    masks: Masks | None = None


@dataclass(slots=True)
class SamplerOutput:
    """The chosen tokens.

    Attributes:
        token_ids: [num_logits] int32; -1 where the logits were not finite.
        logprobs: [num_logits] float32, of the chosen token; None if no row asked.
        ranks: [num_logits] int32, 1 + number of tokens with a greater logit; None if no row asked.
        top_token_ids, top_logprobs: [num_logits, max(num_logprobs)]; None if no row asked.
    """

    token_ids: Int32
    logprobs: Float32 | None = None
    ranks: Int32 | None = None
    top_token_ids: Int32 | None = None
    top_logprobs: Float32 | None = None


@dataclass(slots=True)
class DraftBatch:
    """Requests whose next tokens are to be guessed.

    Attributes:
        rows: [num_seqs], row of each request in `token_ids` and `block_tables`.
        starts, ends: [num_seqs], the tokens from `starts` to `ends` are computed before the first guess.
        num_wanted: [num_seqs], number of tokens to guess, at least 1 each, not ascending.
        token_ids: [num_rows, any], known tokens.
        block_tables: [num_rows, any], with blocks for all guessed tokens but the last.
        block_size: tokens per block.
        num_groups: cache groups in the block tables.
    """

    rows: Int32
    starts: Int32
    ends: Int32
    num_wanted: Int32
    token_ids: Int32
    block_tables: Int32
    block_size: int
    num_groups: int = 1


def find_slots(block_tables: Int32, rows: NDArray[Any], positions: Int32, block_size: int, num_groups: int) -> Int32:
    """The `slot_mapping` of tokens at `positions` of the sequences in these rows of block tables, both [num_tokens]."""
    block_index, offset = np.divmod(positions, block_size)
    if num_groups > 1:
        block_index = block_index * num_groups + np.arange(num_groups, dtype=np.int32)[:, None]
    slots: Int32 = block_tables[rows, block_index] * block_size + offset
    return slots.reshape(num_groups, -1)


class Backend(Protocol):
    """Executes steps of one loaded model over its own paged KV cache."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    def execute(self, batch: ForwardBatch, sampling: SamplingBatch) -> SamplerOutput:
        """Compute the step, write its keys and values, and choose a token at each row of `logits_indices`.

        Calling it again with the same batch gives the same result: writes to the KV cache are idempotent.
        """
        ...

    def forward(self, batch: ForwardBatch, num_layers: int | None = None) -> NDArray[Any]:
        """The logits alone, [num_logits, vocab_size] float32, of the first `num_layers` layers; of all if not set."""
        ...

    def draft(self, batch: DraftBatch, sampling: SamplingBatch, num_layers: int | None = None) -> Int32:
        """Compute the tokens of the batch, and guess the next tokens of each sequence one by one.

        Args:
            sampling: how the first guess of each sequence is chosen; for the next ones positions grow, and penalties
                stay as they are.
            num_layers: number of layers to compute with; all of them if not set.

        Returns:
            [num_seqs, num_wanted[0]] int32; -1 where fewer tokens are wanted, or where the logits were not finite.
        """
        ...
