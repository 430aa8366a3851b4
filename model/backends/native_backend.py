"""The fast backend: packs a `ModelRecord` once and has C++ compute whole steps.  See model/native/.

The bits of a result do not depend on the rest of the batch, the number of threads or the instruction set.  torch is
not imported on this path.
"""

from __future__ import annotations

import os
from ctypes import byref, c_void_p
from typing import Literal

import numpy as np

from shoal.model.backends.native_library import (
    MAX_EXPERTS,
    MAX_HEAD_DIM,
    NO_MEMORY,
    TENSORS,
    Batch,
    Draft,
    Options,
    Shape,
    address,
    load_library,
)
from shoal.model.backends.native_sampling import SamplerArguments
from shoal.model.backends.rope import rope_tables
from shoal.model.record import ModelConfig, ModelRecord
from shoal.model.step.batch import DraftBatch, Float32, ForwardBatch, Int32, SamplerOutput, SamplingBatch
from shoal.scheduler.errors import CheckpointError, ConfigError

# Slots of the KV cache that the native code groups.
SLOTS = 16
_ARRAYS = [name for name, kind, *_ in Batch._fields_ if kind is c_void_p and name != "hidden"]
_FLOAT32 = np.dtype(np.float32)
_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint16): 2}


class NativeBackend:
    """Implements `shoal.model.step.batch.Backend` on the CPU, with float32 activations.

    Args:
        num_blocks, block_size: size of the KV cache; block_size is a multiple of 16.
        num_threads: threads that compute, including the caller's; one per core that the process may use if not set.
        kv_cache_dtype: type of the KV cache's elements.
        quantization: "int8" rounds the weights of linear layers to 8 bits with a scale for each output, and their
            inputs to 13 bits or more with a scale for each row.
        pin_threads: whether to keep each thread but the caller's on a core of its own.  None pins them if the process
            has more cores than threads: otherwise pinned threads could not make room for the server's other work.
        isa: instruction set, one of `supported_isas()`; the best if not set.
        sibling: a backend of the same instruction set whose threads are shared; the two compute in turns.

    Raises:
        CheckpointError: the model's shape exceeds a limit of the native code.
        ConfigError: there is not enough memory.
        LookupError: there is no library for `isa`.
        OSError: the library does not load, or was built from other sources.
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
        self._block_size = block_size
        self._library = load_library(isa)
        self._sampler = SamplerArguments(config.vocab_size)
        self._drafts = SamplerArguments(config.vocab_size)  # of proposals, which come between the steps
        num_positions = min(config.max_position_embeddings, num_blocks * block_size)
        cos, sin = rope_tables(config.rope, config.head_dim, num_positions)
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
        for name, layer, expert, array in record.tensors():
            whole = np.ascontiguousarray(array)
            place = TENSORS.index(name), layer, expert
            self._library.shoal_load(self._model, *place, whole.ctypes.data, _TYPES[whole.dtype])

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self._library.shoal_destroy(self._model)

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    @property
    def hidden_size(self) -> int:
        return self._config.hidden_size

    def execute(self, batch: ForwardBatch, sampling: SamplingBatch) -> SamplerOutput:
        output = self._sampler.bind(sampling)
        assert len(output.token_ids) == len(batch.logits_indices), "as many choices as logits are needed"
        sampler = byref(self._sampler.sampling), byref(self._sampler.chosen)
        step = self._model, self._arrays(batch), self._config.num_layers
        if sampling.masks is None:
            _check(self._library.shoal_step(*step, *sampler, None))
        else:
            _check(self._library.shoal_step(*step, None, None, None))
            sampling.masks.wait()
            _check(self._library.shoal_choose(self._model, len(batch.logits_indices), *sampler))
        return output

    def forward(self, batch: ForwardBatch, num_layers: int | None = None) -> Float32:
        logits = np.empty((len(batch.logits_indices), self.vocab_size), np.float32)
        depth = num_layers or self._config.num_layers
        _check(self._library.shoal_step(self._model, self._arrays(batch), depth, None, None, logits.ctypes.data))
        return logits

    def draft(self, batch: DraftBatch, sampling: SamplingBatch, num_layers: int | None = None) -> Int32:
        self._drafts.bind(sampling)
        num_seqs = len(batch.rows)
        columns = batch.starts, batch.ends, batch.num_wanted, sampling.rows
        assert all(len(column) == num_seqs for column in columns), "arrays of unequal lengths"
        assert batch.block_size == self._block_size, "blocks of another size"
        token_ids = np.full((num_seqs, batch.num_wanted[0]), -1, np.int32)
        arrays = Draft(
            num_layers=num_layers or self._config.num_layers,
            num_seqs=num_seqs,
            rows=address(batch.rows),
            starts=address(batch.starts),
            ends=address(batch.ends),
            num_wanted=address(batch.num_wanted),
            num_rows=min(len(batch.token_ids), len(batch.block_tables)),
            tokens_stride=batch.token_ids.shape[1],
            tokens=address(batch.token_ids),
            blocks_stride=batch.block_tables.shape[1],
            block_tables=address(batch.block_tables),
            token_ids=token_ids.ctypes.data,
        )
        _check(self._library.shoal_draft(self._model, byref(self._drafts.sampling), arrays))
        return token_ids

    def _arrays(self, batch: ForwardBatch) -> Batch:
        num_tokens, num_seqs = len(batch.token_ids), len(batch.context_lens)
        assert len(batch.positions) == len(batch.slot_mapping) == num_tokens, "arrays of unequal lengths"
        assert len(batch.query_start_loc) - 1 == len(batch.block_tables) == num_seqs, "arrays of unequal lengths"
        sizes = num_tokens, num_seqs, len(batch.logits_indices), batch.block_tables.shape[1]
        hidden = None
        if batch.hidden is not None:
            assert batch.hidden.shape == (len(batch.logits_indices), self.hidden_size), "as many states as logits"
            hidden = address(batch.hidden, _FLOAT32)
        return Batch(*sizes, *[address(getattr(batch, name)) for name in _ARRAYS], hidden)


def _check(fault: bytes | None) -> None:
    """Fail if the native code found a fault in an array, which is a bug of ours.

    Raises:
        MemoryError: there was not enough for the step.
    """
    if fault == NO_MEMORY:
        raise MemoryError(fault.decode())
    assert fault is None, fault.decode()


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
