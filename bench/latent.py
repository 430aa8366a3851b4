"""How fast the native backend reads its KV cache in decode: latent attention against grouped-query attention.

The time of a step with a short context is taken from that with a long one: what is left is attention over the cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import numpy as np

from bench.timing import in_turns, seconds
from shoal.model.architecture import DTYPE_BYTES, LatentConfig, LayerConfig, ModelConfig, RopeConfig
from shoal.model.backends.native_backend import NativeBackend
from shoal.model.numbers import Array
from shoal.model.record import Attention, FeedForward, LatentAttention, Layer, Linear, ModelRecord, Norm
from shoal.model.step.batch import ForwardBatch, SamplingBatch
from shoal.model.step.sampling import sampling_rows
from shoal.terminal import show

CONTEXT, SHORT = 4000, 16
BLOCK_SIZE = 16
# So many that no cache of the CPU holds what they read.
NUM_LAYERS = 8
NUM_HEADS, HEAD_DIM, HIDDEN_SIZE, VOCAB_SIZE = 16, 128, 64, 64
# That of DeepSeek-V2-Lite, and 4 to 16 queries for each KV head.
LATENT = LatentConfig(rank=512, rope_dim=64, nope_dim=128, value_dim=128)
KINDS: dict[str, LatentConfig | int] = {"latent": LATENT, "GQA 4": 4, "GQA 8": 2, "GQA 16": 1}


def run(*_: object, steps: int, **__: object) -> dict[str, object]:
    """Time decode of one sequence in turns; print the bytes of cache that each kind reads in a second."""
    threads = sorted({1, len(os.sched_getaffinity(0))})
    cases = [*product(KINDS, ("float32", "float16"), threads)]
    works: list[Callable[[], object]] = []
    for kind, dtype, num_threads in cases:
        backend = _backend(kind, num_threads=num_threads, kv_cache_dtype=dtype)
        works += [partial(backend.execute, *_decode(context)) for context in (CONTEXT, SHORT)]
    times = [median(times) for times in in_turns([partial(seconds, work) for work in works], max(5, steps // 10))]
    rows = [
        {
            "attention": kind,
            "cache": dtype,
            "threads": num_threads,
            "bytes per token": (size := NUM_LAYERS * _layout(kind) * DTYPE_BYTES[dtype]),
            "GB/s": size * (CONTEXT - SHORT) / (long - short) / 1e9,
        }
        for (kind, dtype, num_threads), long, short in zip(cases, times[::2], times[1::2], strict=True)
    ]
    show(f"decode at a context of {CONTEXT}: bytes of the cache read in a second", rows)
    return {"latent": rows}


def _config(kind: str) -> ModelConfig:
    how = KINDS[kind]
    latent = how if isinstance(how, LatentConfig) else None
    layer = LayerConfig(RopeConfig(10_000.0, latent.rope_dim if latent else HEAD_DIM), intermediate_size=16)
    head_dim = latent.nope_dim + latent.rope_dim if latent else HEAD_DIM
    return ModelConfig(
        architecture=kind,
        family=kind,
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_HEADS if isinstance(how, LatentConfig) else how,
        head_dim=head_dim,
        layers=(layer,) * NUM_LAYERS,
        norm_eps=1e-6,
        attention_scale=head_dim**-0.5,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        dtype="float32",
        bos_token_id=None,
        eos_token_ids=(),
        latent=latent,
    )


def _layout(kind: str) -> int:
    """Elements of the cache that a token takes in each layer."""
    return _config(kind).kv_layouts[0].num_elements


def _backend(kind: str, **how: Any) -> NativeBackend:
    """A model of random weights, with a cache that is full: memory that was never written is not read either."""
    config, rng = _config(kind), np.random.default_rng(0)

    def weight(*shape: int) -> Array:
        return rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))

    def linear(out: int, depth: int = HIDDEN_SIZE) -> Linear:
        return Linear(weight(out, depth))

    def attention() -> Attention | LatentAttention:
        size, kv_size = NUM_HEADS * config.head_dim, config.num_kv_heads * config.head_dim
        if config.latent is None:
            return Attention(linear(size), linear(kv_size), linear(kv_size), linear(HIDDEN_SIZE, size))
        latent = config.latent
        return LatentAttention(
            q_down=None,
            q_down_norm=None,
            q_proj=linear(size),
            kv_down=linear(latent.rank + latent.rope_dim),
            kv_norm=Norm(np.ones(latent.rank, np.float32)),
            k_up=weight(NUM_HEADS, latent.nope_dim, latent.rank),
            v_up=weight(NUM_HEADS, latent.value_dim, latent.rank),
            o_proj=linear(HIDDEN_SIZE, NUM_HEADS * latent.value_dim),
        )

    norm = Norm(np.ones(HIDDEN_SIZE, np.float32))
    block = FeedForward(linear(16), linear(16), linear(HIDDEN_SIZE, 16))
    embedding = weight(VOCAB_SIZE, HIDDEN_SIZE)
    layers = tuple(Layer(norm, attention(), norm, block) for _ in config.layers)
    record = ModelRecord(config, embedding, layers, norm, Linear(embedding))
    num_blocks = CONTEXT // BLOCK_SIZE
    backend = NativeBackend(record, num_blocks=num_blocks, block_size=BLOCK_SIZE, **how)
    backend.forward(_fill(num_blocks))
    return backend


def _fill(num_blocks: int) -> ForwardBatch:
    """A step that writes each slot, as many short sequences: each has one block."""
    num_tokens = num_blocks * BLOCK_SIZE
    return ForwardBatch(
        token_ids=np.arange(num_tokens, dtype=np.int32) % np.int32(VOCAB_SIZE),
        positions=np.arange(num_tokens, dtype=np.int32) % np.int32(BLOCK_SIZE),
        slot_mapping=np.arange(num_tokens, dtype=np.int32)[None],
        query_start_loc=np.arange(0, num_tokens + 1, BLOCK_SIZE, dtype=np.int32),
        context_lens=np.full(num_blocks, BLOCK_SIZE, np.int32),
        block_tables=np.arange(num_blocks, dtype=np.int32)[:, None],
        logits_indices=np.zeros(1, np.int32),
    )


def _decode(context: int) -> tuple[ForwardBatch, SamplingBatch]:
    """A step of one token at the end of a context, over scattered blocks."""
    blocks = np.random.default_rng(0).permutation(CONTEXT // BLOCK_SIZE).astype(np.int32)
    table, last = blocks[: -(-context // BLOCK_SIZE)], context - 1
    step = _fill(1)
    batch = replace(
        step,
        token_ids=step.token_ids[:1],
        positions=np.array([last], np.int32),
        slot_mapping=np.array([[table[last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE]], np.int32),
        query_start_loc=np.array([0, 1], np.int32),
        context_lens=np.array([context], np.int32),
        block_tables=table[None],
    )
    return batch, SamplingBatch(sampling_rows(1, temperature=0))
