"""How near the native backend's forward pass is to what the machine can do: memory read and float32 products."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np

from bench.table import show
from shoal.model.backends.native_backend import NativeBackend
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.record import ModelConfig, ModelRecord
from shoal.model.step.batch import ForwardBatch, SamplingBatch
from shoal.model.step.sampling import sampling_rows

CONTEXT = 256
BLOCK_SIZE = 16
NUM_TURNS = 5


@dataclass(frozen=True)
class Precision:
    """What weights and KV cache are kept in; bytes of an element each."""

    name: str
    quantization: Literal["none", "int8"]
    kv_cache_dtype: Literal["float32", "float16"]
    weight_bytes: int
    kv_bytes: int


PRECISIONS = (
    Precision("float32", "none", "float32", 4, 4),
    Precision("float32, KV float16", "none", "float16", 4, 2),
    Precision("int8, KV float16", "int8", "float16", 1, 2),
)


@dataclass(frozen=True)
class Shape:
    """A step of `num_seqs` sequences with `num_queries` tokens each, whose contexts end at `context`."""

    name: str
    num_seqs: int
    num_queries: int
    context: int
    num_logits: int


SHAPES = (
    *(Shape(f"decode {n}", n, 1, CONTEXT, n) for n in (1, 8, 32, 64)),
    Shape("verify 5", 1, 5, CONTEXT, 5),
    Shape("prefill 512", 1, 512, 512, 1),
    Shape("decode 1 at 4000", 1, 1, 4000, 1),
)


def run(checkpoint: Path, num_steps: int) -> dict[str, object]:
    """Time forward passes and what the machine can do in turns; print how much of it each phase reaches."""
    record = load_checkpoint(checkpoint)
    shapes = [shape for shape in SHAPES if shape.context <= record.config.max_position_embeddings]
    num_blocks = max(shape.num_seqs * -(-shape.context // BLOCK_SIZE) for shape in shapes)
    backends = [
        NativeBackend(
            record,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            quantization=precision.quantization,
            kv_cache_dtype=precision.kv_cache_dtype,
        )
        for precision in PRECISIONS
    ]
    machine = _Machine(backends[0].num_threads)
    # The threads of a matmul spin for a while after it, so that no step of ours comes next.
    works: list[Callable[[], object]] = [machine.multiply, machine.read]
    works += [
        lambda backend=backend, batch=batch, sampling=sampling: backend.execute(batch, sampling)  # type: ignore[misc]
        for backend in backends
        for batch, sampling in [(_batch(shape, record.config), _greedy(shape)) for shape in shapes]
    ]
    seconds = _in_turns(works, num_steps)
    rate, bandwidth = machine.num_flops / seconds[0], machine.num_bytes / seconds[1]
    rows: list[dict[str, object]] = [
        _row(precision, shape, record, seconds[2 + i * len(shapes) + j], (bandwidth, rate))
        for i, precision in enumerate(PRECISIONS)
        for j, shape in enumerate(shapes)
    ]
    limits = {"read GB/s": bandwidth / 1e9, "float32 GFLOP/s": rate / 1e9}
    show("machine: median of numpy's dot and matmul", [limits])
    show(f"native: median step, context {CONTEXT}; limit = max(bytes / read, operations / float32 rate)", rows)
    return {"machine": limits, "roofline": rows}


class _Machine:
    """What there is to reach: numpy's BLAS reads memory in `dot` and multiplies in `matmul`."""

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads)
        self._vectors = [np.ones((2, 1 << 25), np.float32) for _ in range(num_threads)]
        self._left, self._right = np.ones((1024, 1024), np.float32), np.ones((1024, 2048), np.float32)
        self.num_bytes = sum(pair.nbytes for pair in self._vectors)
        self.num_flops = 2 * 1024 * 1024 * 2048

    def read(self) -> None:
        list(self._threads.map(lambda pair: np.dot(pair[0], pair[1]), self._vectors))

    def multiply(self) -> None:
        np.matmul(self._left, self._right)


def _in_turns(works: list[Callable[[], object]], num_steps: int) -> list[float]:
    """Median seconds of each, one step in each of many turns: a machine's memory is not equally fast at all times."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(max(NUM_TURNS, num_steps // 10)):
        for work, found in zip(works, times, strict=True):
            time.sleep(0.05)  # the threads of the one before have stopped spinning by then
            work()  # finds the caches full of what ran before
            began = time.perf_counter()
            work()
            found.append(time.perf_counter() - began)
    return [median(found) for found in times]


def _batch(shape: Shape, config: ModelConfig) -> ForwardBatch:
    blocks = -(-shape.context // BLOCK_SIZE)
    tables = np.arange(shape.num_seqs * blocks, dtype=np.int32).reshape(shape.num_seqs, blocks)
    positions = np.tile(np.arange(shape.context - shape.num_queries, shape.context), shape.num_seqs).astype(np.int32)
    sequences = np.repeat(np.arange(shape.num_seqs), shape.num_queries)
    slots = tables[sequences, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    ends = np.arange(shape.num_seqs + 1, dtype=np.int32) * shape.num_queries
    return ForwardBatch(
        token_ids=np.random.default_rng(0).integers(0, config.vocab_size, len(positions)).astype(np.int32),
        positions=positions,
        slot_mapping=slots.astype(np.int32),
        query_start_loc=ends,
        context_lens=np.full(shape.num_seqs, shape.context, np.int32),
        block_tables=tables,
        logits_indices=np.arange(ends[-1], dtype=np.int32)[-shape.num_logits :],
    )


def _greedy(shape: Shape) -> SamplingBatch:
    return SamplingBatch(sampling_rows(shape.num_logits, temperature=0))


def _row(
    precision: Precision, shape: Shape, record: ModelRecord, seconds: float, limits: tuple[float, float]
) -> dict[str, object]:
    """What a step must read and multiply at least, and the share of that limit it reaches.

    int8 products are quicker than float32 ones, so their arithmetic sets no limit here.
    """
    bandwidth, rate = limits
    config = record.config
    num_tokens = shape.num_seqs * shape.num_queries
    per_token = _weights_used(record, 1) - record.head.size
    weights = _weights_used(record, num_tokens)
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * shape.num_seqs * shape.context
    num_bytes = weights * precision.weight_bytes + kv * precision.kv_bytes
    keys = num_tokens * (shape.context - (shape.num_queries - 1) / 2)
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * keys
    flops = 2 * (per_token * num_tokens + record.head.size * shape.num_logits) + attention
    limit = max(num_bytes / bandwidth, flops / rate if precision.weight_bytes == 4 else 0.0)
    return {
        "precision": precision.name,
        "step": shape.name,
        "ms": seconds * 1e3,
        "tokens/s": num_tokens / seconds,
        "GB/s": num_bytes / seconds / 1e9,
        "GFLOP/s": flops / seconds / 1e9,
        "of the limit": limit / seconds,
    }


def _weights_used(record: ModelRecord, num_tokens: int) -> float:
    """Weights that a step of so many tokens reads: of the experts, those that are expected to be chosen."""
    config = record.config
    if not config.num_experts:
        return record.num_parameters
    expert = 3 * config.intermediate_size * config.hidden_size
    used = config.num_experts * (1 - (1 - config.num_experts_per_tok / config.num_experts) ** num_tokens)
    return record.num_parameters - config.num_layers * expert * (config.num_experts - used)
