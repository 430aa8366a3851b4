"""The fast backend: packs a `ModelRecord` once and has C++ compute whole steps.  See model/native/.

Its results have the same bits whatever else is in the batch, on any number of threads and under each instruction set.
torch is not imported on this path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from ctypes import byref
from typing import Literal

import numpy as np

from model.backends.native_library import MAX_EXPERTS, MAX_HEAD_DIM, TENSORS, Batch, Draft, Options, Shape, load_library
from model.backends.native_sampling import SamplerArguments
from model.backends.rope import rope_tables
from model.batch import DraftBatch, Float32, ForwardBatch, Int32, SamplerOutput, SamplingBatch
from model.config import ModelConfig
from model.record import Array, Experts, FeedForward, Layer, ModelRecord
from scheduler.errors import CheckpointError, ConfigError

# Slots of the KV cache that the native code gathers.
SLOTS = 16
_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint16): 2}


class NativeBackend:
    """Implements `model.batch.Backend` on the CPU, with float32 activations.

    Args:
        num_blocks, block_size: of the KV cache; block_size is a multiple of 16.
        num_threads: threads that compute, the caller's among them; one per core that the process may use if not set.
        kv_cache_dtype: of the KV cache's elements.
        quantization: "int8" rounds the weights of linear layers to 8 bits with a scale for each output, and their
            inputs to 13 bits or more with a scale for each row.
        pin_threads: whether to keep each further thread on a core of its own; None does where cores are left over for
            what else the server has to do, since without any it only keeps the threads from making room.
        isa: instruction set, one of `supported_isas()`; the best if not set.
        sibling: a backend of the same instruction set with whose threads to compute, in turns.

    Raises:
        CheckpointError: the model's shape is beyond what the native code is made for.
        ConfigError: there is not enough memory.
        LookupError: there is no library.
    """

    def __init__(
        self,
        record: ModelRecord,
        *,
        num_blocks: int,
        block_size: int,
        num_threads: int | None = None,
        kv_cache_dtype: Literal["float32", "float16"] = "float32",
        quantization: Literal["none", "int8"] = "none",
        pin_threads: bool | None = None,
        isa: str | None = None,
        sibling: NativeBackend | None = None,
    ) -> None:
        assert block_size % SLOTS == 0
        config = record.config
        _check_shape(config)
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.num_threads: int = sibling.num_threads if sibling else num_threads or num_cores
        self._config = config
        self._num_blocks, self._block_size = num_blocks, block_size
        self._num_positions = min(config.max_position_embeddings, num_blocks * block_size)
        self._library = load_library(isa)
        self._sampler = SamplerArguments(config.vocab_size)
        self._drafts = SamplerArguments(
            config.vocab_size
        )  # of guesses, whose parameters stay as long as those of steps
        self._layout: _Layout | None = None
        cos, sin = rope_tables(config.rope, config.head_dim, self._num_positions)
        options = Options(
            num_blocks=num_blocks,
            block_size=block_size,
            num_threads=self.num_threads,
            pin_threads=pin_threads if pin_threads is not None else self.num_threads < num_cores,
            quantize_int8=quantization == "int8",
            half_kv_cache=kv_cache_dtype == "float16",
        )
        self._model: int | None = self._library.shoal_create(
            _shape(record, cos, sin), options, sibling._model if sibling else None
        )
        if not self._model:
            raise ConfigError("there is not enough memory for the model and its KV cache", param="memory_mib")
        for name, layer, expert, array in _tensors(record):
            self._load(name, layer, expert, array)

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self._library.shoal_destroy(self._model)

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    def execute(self, batch: ForwardBatch, sampling: SamplingBatch) -> SamplerOutput:
        output = self._sampler.bind(sampling)
        assert len(output.token_ids) == len(batch.logits_indices), "as many choices as logits are needed"
        sampler = byref(self._sampler.sampling), byref(self._sampler.chosen)
        self._library.shoal_step(self._model, self._arrays(batch), self._config.num_layers, *sampler, None)
        return output

    def forward(self, batch: ForwardBatch, num_layers: int | None = None) -> Float32:
        logits = np.empty((len(batch.logits_indices), self.vocab_size), np.float32)
        depth = num_layers or self._config.num_layers
        self._library.shoal_step(self._model, self._arrays(batch), depth, None, None, logits.ctypes.data)
        return logits

    def draft(self, batch: DraftBatch, sampling: SamplingBatch, num_layers: int | None = None) -> Int32:
        self._drafts.bind(sampling)
        self._check_draft(batch, len(sampling.seeds))
        token_ids = np.full((len(batch.rows), batch.num_wanted[0]), -1, np.int32)
        arrays = Draft(
            num_layers=num_layers or self._config.num_layers,
            num_seqs=len(batch.rows),
            rows=batch.rows.ctypes.data,
            starts=batch.starts.ctypes.data,
            ends=batch.ends.ctypes.data,
            num_wanted=batch.num_wanted.ctypes.data,
            tokens_stride=batch.token_ids.shape[1],
            tokens=batch.token_ids.ctypes.data,
            blocks_stride=batch.block_tables.shape[1],
            block_tables=batch.block_tables.ctypes.data,
            token_ids=token_ids.ctypes.data,
        )
        self._library.shoal_draft(self._model, byref(self._drafts.sampling), arrays)
        return token_ids

    def _check_draft(self, batch: DraftBatch, num_choices: int) -> None:
        """As `_check`, but for what stands in the tables: they are what steps are made of, and checked there."""
        starts, ends, num_wanted = batch.starts, batch.ends, batch.num_wanted
        assert len(batch.rows) == len(starts) == len(ends) == len(num_wanted) == num_choices, (
            "arrays of unequal lengths"
        )
        assert batch.block_size == self._block_size, "blocks of another size"
        assert _within(batch.rows, min(len(batch.token_ids), len(batch.block_tables))), "rows beyond the tables"
        assert _within(starts, self._num_positions), "starts beyond the model's positions"
        assert (starts < ends).all(), "nothing to guess from"
        assert int(ends.max()) <= batch.token_ids.shape[1], "ends beyond the tokens"
        assert (num_wanted[1:] <= num_wanted[:-1]).all(), "num_wanted ascends"
        assert num_wanted[-1] > 0, "num_wanted of nothing"
        reach = int((ends + num_wanted).max()) - 1
        assert reach <= min(batch.block_tables.shape[1] * self._block_size, self._num_positions), (
            "guesses too far ahead"
        )
        for table in (batch.token_ids, batch.block_tables):
            assert table.dtype == np.int32, "a table of other numbers"
            assert table.flags.c_contiguous, "a table with gaps"

    def _arrays(self, batch: ForwardBatch) -> Batch:
        self._check(batch)
        return Batch(
            num_tokens=len(batch.token_ids),
            num_seqs=len(batch.context_lens),
            num_logits=len(batch.logits_indices),
            max_blocks=batch.block_tables.shape[1],
            token_ids=batch.token_ids.ctypes.data,
            positions=batch.positions.ctypes.data,
            slot_mapping=batch.slot_mapping.ctypes.data,
            query_start_loc=batch.query_start_loc.ctypes.data,
            block_tables=batch.block_tables.ctypes.data,
            logits_indices=batch.logits_indices.ctypes.data,
        )

    def _check(self, batch: ForwardBatch) -> None:
        """The native code trusts what it is given; an array that is wrong is a bug of ours, and ends here."""
        num_tokens, ends = len(batch.token_ids), batch.query_start_loc
        assert _within(batch.token_ids, self.vocab_size), "token_ids beyond the vocabulary"
        assert _within(batch.positions, self._num_positions), "positions beyond the model's"
        assert _within(batch.slot_mapping, self._num_blocks * self._block_size), "slot_mapping beyond the KV cache"
        assert _within(batch.block_tables, self._num_blocks), "block_tables beyond the KV cache"
        assert len(batch.positions) == len(batch.slot_mapping) == num_tokens, "arrays of unequal lengths"
        assert len(ends) == len(batch.context_lens) + 1 == len(batch.block_tables) + 1, "arrays of unequal lengths"
        most = batch.block_tables.shape[1] * self._block_size
        assert 0 < batch.context_lens.max() <= most, "context_lens beyond the block tables"
        if self._layout is None or not self._layout.is_of(batch):  # while a batch only decodes, it stays
            self._layout = _Layout(batch)
        self._layout.check_positions(batch)

    def _load(self, name: str, layer: int, expert: int, array: Array) -> None:
        array = np.ascontiguousarray(array)
        number = TENSORS.index(name)
        self._library.shoal_load(self._model, number, layer, expert, array.ctypes.data, _TYPES[array.dtype])


class _Layout:
    """The queries of each sequence and the logits that are wanted, checked.

    Attributes:
        counts: [num_seqs], queries of each sequence.
        remaining: [num_tokens], queries that are left of its sequence at each token, its own among them.
    """

    def __init__(self, batch: ForwardBatch) -> None:
        ends, indices, num_tokens = batch.query_start_loc, batch.logits_indices, len(batch.token_ids)
        assert _within(ends, num_tokens + 1), "query_start_loc beyond the tokens"
        assert ends[0] == 0, "query_start_loc does not begin with the first token"
        assert ends[-1] == num_tokens, "query_start_loc does not end with the last token"
        assert (ends[1:] > ends[:-1]).all(), "query_start_loc does not ascend"
        assert _within(indices, num_tokens), "logits_indices beyond the tokens"
        assert (indices[1:] > indices[:-1]).all(), "logits_indices do not ascend"
        self._ends, self._indices = ends, indices
        self.counts = ends[1:] - ends[:-1]
        self.remaining = np.repeat(ends[1:], self.counts) - np.arange(num_tokens, dtype=np.int32)

    def is_of(self, batch: ForwardBatch) -> bool:
        return self._ends is batch.query_start_loc and self._indices is batch.logits_indices

    def check_positions(self, batch: ForwardBatch) -> None:
        assert len(self.remaining) == len(batch.positions), "query_start_loc does not end with the last token"
        ends = np.repeat(batch.context_lens, self.counts)
        assert (batch.positions + self.remaining == ends).all(), "positions that do not lead to the end of the context"


def _within(values: Int32, limit: int) -> bool:
    """Whether these are int32 without gaps in memory, at least 0 and below the limit: negative ones are large without
    their sign."""
    assert values.dtype == np.int32, "an array of other numbers"
    assert values.flags.c_contiguous, "an array with gaps"
    return not values.size or int(np.maximum.reduce(values.view(np.uint32), axis=None)) < limit


def _check_shape(config: ModelConfig) -> None:
    for name, value, limit in (
        ("head_dim", config.head_dim, MAX_HEAD_DIM),
        ("num_experts", config.num_experts, MAX_EXPERTS),
    ):
        if value > limit:
            raise CheckpointError(f"{name} {value} exceeds the {limit} that the native backend is made for", param=name)


def _shape(record: ModelRecord, cos: Float32, sin: Float32) -> Shape:
    tables = {"num_positions": len(cos), "cos": cos.ctypes.data, "sin": sin.ctypes.data}
    fields = {"tie_word_embeddings": record.head is record.embedding, **tables}
    names = [name for name, *_ in Shape._fields_ if name not in fields]
    return Shape(**{name: getattr(record.config, name) for name in names}, **fields)


def _tensors(record: ModelRecord) -> Iterator[tuple[str, int, int, Array]]:
    """All weights: name, layer, expert, array."""
    if record.head is not record.embedding:
        yield "embedding", 0, 0, record.embedding
    yield "head", 0, 0, record.head
    yield "norm", 0, 0, record.norm
    for index, layer in enumerate(record.layers):
        yield "input_norm", index, 0, layer.input_norm
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield name, index, 0, getattr(layer.attention, name)
        yield "post_attention_norm", index, 0, layer.post_attention_norm
        if isinstance(layer.feed_forward, Experts):
            yield "router", index, 0, layer.feed_forward.router
        for expert, weights in enumerate(_experts(layer)):
            for name in ("gate_proj", "up_proj", "down_proj"):
                yield name, index, expert, getattr(weights, name)


def _experts(layer: Layer) -> tuple[FeedForward, ...]:
    return layer.feed_forward.experts if isinstance(layer.feed_forward, Experts) else (layer.feed_forward,)
