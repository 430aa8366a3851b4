"""What a backend is asked to compute: index arrays for one variable-length step, and how to choose the tokens.

All arrays are numpy, C-contiguous, and valid only during the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]
Float32 = NDArray[np.float32]


@dataclass(slots=True)
class ForwardBatch:
    """One step over `num_seqs` sequences and `num_tokens` tokens; prefill chunks, single tokens and drafted tokens
    are all just queries of a sequence.

    Attributes:
        token_ids: [num_tokens], sequence after sequence.
        positions: [num_tokens], index of each token in its sequence.
        slot_mapping: [num_tokens], where its key and value go: block_id * block_size + offset.
        query_start_loc: [num_seqs + 1], sequence s owns tokens query_start_loc[s] to query_start_loc[s + 1].
        context_lens: [num_seqs], tokens of the sequence in the KV cache after this step.
        block_tables: [num_seqs, max_blocks], block ids; entries past the context are some block's id and never read.
        logits_indices: [num_logits], tokens whose logits are needed, ascending.
    """

    token_ids: Int32
    positions: Int32
    slot_mapping: Int32
    query_start_loc: Int32
    context_lens: Int32
    block_tables: Int32
    logits_indices: Int32


@dataclass(slots=True)
class SamplingBatch:
    """How to choose a token at each of the `num_logits` rows.  `model/step/sampling.py` specifies the choice exactly.

    Attributes:
        temperature, top_p, min_p: [num_logits] float32.
        top_k: [num_logits] int32, 0 keeps all.
        presence_penalty, frequency_penalty, repetition_penalty: [num_logits] float32.
        seeds: [num_logits] uint64.
        positions: [num_logits] int64, index in the sequence of the token to be chosen.
        forced_token_ids: [num_logits] int32; -1 to choose, else this token is taken (a prompt token to be scored).
        num_logprobs: [num_logits] int32; -1 for none, else alternatives to report beside the chosen token.
        penalty_rows, penalty_token_ids, penalty_counts: [num_entries] sparse history of the rows that have a penalty:
            row, token id seen before, and how often it was generated, 0 if it stands in the prompt only.  Rows
            ascend; each (row, token) at most once.
        bias_rows, bias_token_ids, bias: [num_biases] sparse addends to the logits (float32); -inf bans a token.  Rows
            ascend.
    """

    temperature: Float32
    top_k: Int32
    top_p: Float32
    min_p: Float32
    presence_penalty: Float32
    frequency_penalty: Float32
    repetition_penalty: Float32
    seeds: UInt64
    positions: Int64
    forced_token_ids: Int32
    num_logprobs: Int32
    penalty_rows: Int32
    penalty_token_ids: Int32
    penalty_counts: Int32
    bias_rows: Int32
    bias_token_ids: Int32
    bias: Float32

    @classmethod
    def plain(cls, temperature: Float32, seeds: UInt64, positions: Int64) -> SamplingBatch:
        """Nothing but a temperature, [num_logits] as the other two."""
        num_logits = len(temperature)
        zeros, ones = np.zeros(num_logits, np.float32), np.ones(num_logits, np.float32)
        minus_ones, none = np.full(num_logits, -1, np.int32), np.empty(0, np.int32)
        return cls(
            temperature=temperature,
            top_k=np.zeros(num_logits, np.int32),
            top_p=ones,
            min_p=zeros,
            presence_penalty=zeros,
            frequency_penalty=zeros,
            repetition_penalty=ones,
            seeds=seeds,
            positions=positions,
            forced_token_ids=minus_ones,
            num_logprobs=minus_ones,
            penalty_rows=none,
            penalty_token_ids=none,
            penalty_counts=none,
            bias_rows=none,
            bias_token_ids=none,
            bias=np.empty(0, np.float32),
        )


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
    """Requests whose next tokens are to be guessed, by their rows in two tables.

    Attributes:
        rows: [num_seqs].
        starts, ends: [num_seqs], the tokens from `starts` to `ends` are computed before the first guess.
        num_wanted: [num_seqs], at least 1 each, not ascending: tokens to guess.
        token_ids: [num_rows, any], known tokens.
        block_tables: [num_rows, any], which reach as far as the guesses do, but for the last.
        block_size: tokens per block.
    """

    rows: Int32
    starts: Int32
    ends: Int32
    num_wanted: Int32
    token_ids: Int32
    block_tables: Int32
    block_size: int


class Backend(Protocol):
    """Executes steps of one loaded model over its own paged KV cache."""

    @property
    def vocab_size(self) -> int: ...

    def execute(self, batch: ForwardBatch, sampling: SamplingBatch) -> SamplerOutput:
        """Compute the step, write its keys and values, and choose a token at each row of `logits_indices`.

        Calling it again with the same batch gives the same result: writes to the KV cache are idempotent.
        """
        ...

    def forward(self, batch: ForwardBatch, num_layers: int | None = None) -> NDArray[Any]:
        """The logits alone, [num_logits, vocab_size] float32, of the first `num_layers` layers or of all of them."""
        ...

    def draft(self, batch: DraftBatch, sampling: SamplingBatch, num_layers: int | None = None) -> Int32:
        """Compute what the batch says, and guess on from the end of each sequence, token by token.

        Args:
            sampling: how the first guess of each sequence is chosen; positions grow from there, penalties stay.
            num_layers: how many layers to compute with; all of them if not set.

        Returns:
            [num_seqs, num_wanted[0]] int32; -1 where fewer are wanted, or where the logits were not finite.
        """
        ...
