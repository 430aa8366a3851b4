"""The fast backend: packs a `ModelRecord` once and has C++ compute whole steps.  See model/native/.

The bits of a result do not depend on the rest of the batch, the number of threads or the instruction set.  torch is
not imported on this path.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import byref, c_void_p
from dataclasses import fields
from typing import Literal

import numpy as np

from shoal.model.backends.cores import num_cores
from shoal.model.backends.native_library import (
    ARITHMETICS,
    KV_CACHES,
    NO_MEMORY,
    TENSORS,
    Batch,
    Draft,
    Options,
    address,
    has_bfloat16,
    load_library,
    supported_isas,
)
from shoal.model.backends.native_sampling import SamplerArguments
from shoal.model.backends.native_shape import NativeShape, check_cache, find_obstacle
from shoal.model.backends.observed import Observed
from shoal.model.mapped import release
from shoal.model.numbers import BLOCKS, Array, block_dtype
from shoal.model.record import ModelRecord, Norm
from shoal.model.step.batch import DraftBatch, Float32, ForwardBatch, Int32, SamplerOutput, SamplingBatch
from shoal.scheduler.errors import CheckpointError, ConfigError

# Slots of the KV cache that the native code groups.
SLOTS = 16
_ARRAYS = [name for name, kind, *_ in Batch._fields_ if kind is c_void_p and name not in ("hidden", "inputs")]
_FLOAT32 = np.dtype(np.float32)
# In the order of source.h.
_PLAIN = [np.dtype(kind) for kind in (np.float32, np.float16, np.uint16)]
_TYPES = {dtype: index for index, dtype in enumerate([*_PLAIN, *map(block_dtype, BLOCKS)])}


class NativeBackend:
    """Implements `shoal.model.step.batch.Backend` on the CPU, with float32 activations and sums.

    Args:
        num_blocks, block_size: size of the KV cache; block_size is a multiple of 16.
        num_threads: threads that compute, including the caller's; one per core that the process may use if not set.
        kv_cache_dtype: type of the KV cache's elements.  "int8" has a scale for each key and each value, and is not
            for latent attention.
        dtype: what linear layers multiply.  "bfloat16" rounds their weights and inputs to it, and keeps weights so.
        quantization: "int8" has linear layers multiply bytes: their inputs in 8 bits, and weights as blocks of Q8_0,
            or of Q4_0, Q4_1 or Q4_K where the checkpoint has these.  With "int4" blocks of Q4_1 take the place of those
            of Q8_0 but in the head.  The dtype is "float32" then.
        pin_threads: whether to keep each thread but the caller's on a core of its own.  None pins them if the process
            has more cores than threads: otherwise pinned threads could not make room for the server's other work.
        isa: instruction set, one of `supported_isas()`; the best if not set.
        sibling: a backend of the same instruction set whose threads are shared; the two compute in turns.

    Raises:
        CheckpointError: the native code is not made for the model.
        ConfigError: there is not enough memory, or no such KV cache for the model.
        LookupError: there is no library for `isa`, or the machine lacks the instructions for `dtype`.
        OSError: the library does not load, or was built from other sources.
    """

    def __init__(
        self,
        record: ModelRecord,
        *,
        num_blocks: int,
        block_size: int,
        num_threads: int | None = None,
        kv_cache_dtype: Literal["float32", "float16", "int8"] = "float32",
        dtype: Literal["float32", "bfloat16"] = "float32",
        quantization: Literal["none", "int8", "int4"] = "none",
        pin_threads: bool | None = None,
        isa: str | None = None,
        sibling: NativeBackend | None = None,
    ) -> None:
        assert block_size % SLOTS == 0
        assert dtype == "float32" or quantization == "none", "one kind of products"
        config = record.config
        if obstacle := find_obstacle(config):
            raise CheckpointError(obstacle[1], param=obstacle[0])
        check_cache(config, kv_cache_dtype)
        self.num_threads: int = sibling.num_threads if sibling else num_threads or num_cores()
        self._config = config
        self._block_size = block_size
        self._library = load_library(isa)
        if dtype == "bfloat16" and (isa or supported_isas()[0]) == "avx512" and not has_bfloat16():
            raise LookupError("products of bfloat16 need a processor with AVX512-BF16")
        self._sampler = SamplerArguments(config.vocab_size)
        self._drafts = SamplerArguments(config.vocab_size)  # of proposals, which come between the steps
        num_positions = config.most_positions(num_blocks * block_size)
        shape = NativeShape(config, num_positions, record.head.weight is record.embedding)
        options = Options(
            num_blocks=num_blocks,
            block_size=block_size,
            num_threads=self.num_threads,
            pin_threads=pin_threads if pin_threads is not None else self.num_threads < num_cores(),
            arithmetic=ARITHMETICS.index(dtype if quantization == "none" else quantization),
            kv_cache=KV_CACHES.index(kv_cache_dtype),
        )
        self._model: int | None = self._library.shoal_create(shape.shape, options, sibling._model if sibling else None)
        no_memory = ConfigError("there is not enough memory for the model and its KV cache", param="memory_mib")
        if not self._model:
            raise no_memory
        for name, layer, expert, array in _tensors(record):
            whole = np.ascontiguousarray(array)
            owner, _, bias = name.partition(".")
            place = TENSORS.index(owner), bool(bias), layer, expert
            if self._library.shoal_load(self._model, *place, whole.ctypes.data, _TYPES[whole.dtype]):
                raise no_memory
            release(array)

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
        assert batch.num_groups == len(self._config.cache_groups), "block tables for each group"
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

    def observe(self, *, is_observed: bool) -> Observed | None:
        """Begin to add up what those who watch want to know of steps, or end that and return None."""
        self._observed = observed = Observed.of(self._config) if is_observed else None
        if observed is None:
            self._library.shoal_observe(self._model, None, 0, None)
        else:
            rows = observed.expert_rows
            places = (None, 0) if rows is None else (rows.ctypes.data, rows.shape[1])
            self._library.shoal_observe(self._model, *places, observed.sample_seconds.ctypes.data)
        return observed

    def _arrays(self, batch: ForwardBatch) -> Batch:
        num_tokens, num_seqs = len(batch.token_ids), len(batch.context_lens)
        num_groups = len(self._config.cache_groups)
        assert len(batch.positions) == num_tokens, "arrays of unequal lengths"
        assert batch.slot_mapping.size == num_groups * num_tokens, "slots for each group"
        assert len(batch.query_start_loc) - 1 == len(batch.block_tables) == num_seqs, "arrays of unequal lengths"
        assert batch.block_tables.shape[1] % num_groups == 0, "block tables for each group"
        sizes = num_tokens, num_seqs, len(batch.logits_indices), batch.block_tables.shape[1] // num_groups
        vectors = batch.hidden, batch.inputs
        assert all(x is None or x.shape == (num_tokens, self.hidden_size) for x in vectors), "as many vectors as tokens"
        places = [None if x is None else address(x, _FLOAT32) for x in vectors]
        return Batch(*sizes, *[address(getattr(batch, name)) for name in _ARRAYS], *places)


def _check(fault: bytes | None) -> None:
    """Fail if the native code found a fault in an array, which is a bug of ours.

    Raises:
        MemoryError: there was not enough for the step.
    """
    if fault == NO_MEMORY:
        raise MemoryError(fault.decode())
    assert fault is None, fault.decode()


def _tensors(record: ModelRecord) -> Iterator[tuple[str, int, int, Array]]:
    """The tensors of the record, and ones for norms that have no gain: the native code finds a norm by its gain."""
    yield from record.tensors()
    config, latent = record.config, record.config.latent
    sizes = {"q_norm": config.num_heads * config.head_dim, "k_norm": config.num_kv_heads * config.head_dim}
    if latent:
        sizes |= {"q_down_norm": latent.query_rank, "kv_norm": latent.rank}
    for index, owner in [(0, record), *((i, part) for i, x in enumerate(record.layers) for part in (x, x.attention))]:
        for part in fields(owner):
            norm = getattr(owner, part.name)
            if isinstance(norm, Norm) and norm.gain is None:
                yield part.name, index, 0, np.ones(sizes.get(part.name, config.hidden_size), np.float32)
