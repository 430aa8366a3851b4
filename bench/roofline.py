"""How near the native backend's forward pass is to what the machine can do: memory read and float32 products."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.timing import in_turns, seconds
from shoal.model.architecture import ModelConfig
from shoal.model.backends.native_backend import NativeBackend
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.numbers import count_numbers
from shoal.model.record import ModelRecord
from shoal.model.step.batch import ForwardBatch, SamplingBatch
from shoal.server.planner.costs import Step
from shoal.server.planner.measure import uniform_step
from shoal.terminal import show

CONTEXT = 256
BLOCK_SIZE = 16
# What is asked for: arguments of the backend, the bytes of a weight (None: as the file has them), and those of a number
# in the KV cache.
PRECISIONS: dict[str, tuple[dict[str, Any], float | None, int]] = {
    "as stored": ({}, None, 4),
    "as stored, KV float16": ({"kv_cache_dtype": "float16"}, None, 2),
    "bfloat16, KV float16": ({"dtype": "bfloat16", "kv_cache_dtype": "float16"}, 2, 2),
    "int8, KV float16": ({"quantization": "int8", "kv_cache_dtype": "float16"}, 34 / 32, 2),
    "int4, KV float16": ({"quantization": "int4", "kv_cache_dtype": "float16"}, 20 / 32, 2),
}
# Steps: sequences, tokens of each, where their contexts end, and logits.
SHAPES = {
    **{f"decode {n}": (n, 1, CONTEXT, n) for n in (1, 8, 32, 64)},
    "verify 5": (1, 5, CONTEXT, 5),
    "prefill 512": (1, 512, 512, 1),
    "decode 1 at 4000": (1, 1, 4000, 1),
}


def run(checkpoint: Path, *, steps: int, **_: object) -> dict[str, object]:
    """Time forward passes and what the machine can do in turns; print how much of it each step reaches."""
    record = load_checkpoint(checkpoint)
    names = [name for name, (_, _, context, _) in SHAPES.items() if context <= record.config.max_position_embeddings]
    batches = [_step(name, record.config) for name in names]
    num_blocks = max(batch.block_tables.size for batch, _ in batches)
    backends = [
        NativeBackend(record, num_blocks=num_blocks, block_size=BLOCK_SIZE, **arguments)
        for arguments, _, _ in PRECISIONS.values()
    ]
    # numpy's BLAS multiplies in `matmul` and reads memory in `dot`.
    left, right = np.ones((1024, 1024), np.float32), np.ones((1024, 2048), np.float32)
    vectors = [np.ones((2, 1 << 25), np.float32) for _ in range(backends[0].num_threads)]
    with ThreadPoolExecutor(len(vectors)) as threads:
        works: list[Callable[[], object]] = [
            partial(np.matmul, left, right),
            lambda: list(threads.map(lambda pair: np.dot(pair[0], pair[1]), vectors)),
            *(partial(backend.execute, *step) for backend in backends for step in batches),
        ]
        # Many short turns: a machine's memory is not equally fast at all times.
        times = in_turns([partial(seconds, work) for work in works], max(5, steps // 10), pause=0.05)
    multiplying, reading, *own = map(median, times)
    rate, bandwidth = 2 * left.size * right.shape[1] / multiplying, sum(pair.nbytes for pair in vectors) / reading
    kinds = [(precision, shape) for precision in PRECISIONS for shape in names]
    rows = [_row(*kind, record, time, bandwidth=bandwidth, rate=rate) for kind, time in zip(kinds, own, strict=True)]
    limits = {"read GB/s": bandwidth / 1e9, "float32 GFLOP/s": rate / 1e9}
    show("machine: median of numpy's dot and matmul", [limits])
    show(f"native: median step, context {CONTEXT}; limit = max(bytes / read, operations / float32 rate)", rows)
    return {"machine": limits, "roofline": rows}


def _step(name: str, config: ModelConfig) -> tuple[ForwardBatch, SamplingBatch]:
    num_seqs, each, context, num_logits = SHAPES[name]
    return uniform_step(config, Step(num_seqs, each, context, num_logits), BLOCK_SIZE)


def _row(
    precision: str, step: str, record: ModelRecord, time: float, *, bandwidth: float, rate: float
) -> dict[str, object]:
    """What a step must read and multiply at least, and the share of that limit it reaches.

    Other products are quicker than float32 ones, so their arithmetic sets no limit here.
    """
    config = record.config
    num_seqs, each, context, num_logits = SHAPES[step]
    _, asked, kv_bytes = PRECISIONS[precision]
    weight_bytes = asked or sum(array.nbytes for *_, array in record.tensors()) / record.num_parameters
    num_tokens = num_seqs * each
    without_experts = record.num_parameters - _expert_weights(config, inf)
    weights = without_experts + _expert_weights(config, num_tokens)
    kv = sum(layout.num_elements for layout in config.kv_layouts) * num_seqs * context
    num_bytes = weights * weight_bytes + kv * kv_bytes
    widths = sum(layout.key_width + layout.value_width for layout in config.kv_layouts)
    attention = 2 * widths * config.num_heads * num_tokens * (context - (each - 1) / 2)
    head = count_numbers(record.head.weight)
    flops = 2 * ((without_experts + _expert_weights(config, 1) - head) * num_tokens + head * num_logits) + attention
    limit = max(num_bytes / bandwidth, 0.0 if asked else flops / rate)
    return {
        "precision": precision,
        "step": step,
        "ms": time * 1e3,
        "tokens/s": num_tokens / time,
        "GB/s": num_bytes / time / 1e9,
        "GFLOP/s": flops / time / 1e9,
        "of the limit": limit / time,
    }


def _expert_weights(config: ModelConfig, num_tokens: float) -> float:
    """Return the number of expert weights that a step of `num_tokens` tokens reads if the router chooses evenly."""
    total = 0.0
    for mixture in (layer.mixture for layer in config.layers if layer.mixture):
        untouched: float = (1 - mixture.num_experts_per_tok / mixture.num_experts) ** num_tokens
        matrices = (3 if config.gated else 2) * mixture.intermediate_size * config.hidden_size
        total += mixture.num_experts * (1 - untouched) * matrices
    return total
