"""Storage never changes a token: weights as the checkpoint has them, and the float32 numbers for which they stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.model.backends.native_backend import NativeBackend
from shoal.model.backends.native_library import supported_isas
from shoal.model.numbers import BLOCKS, Array, block_dtype, count_numbers, in_float32
from shoal.model.record import ModelRecord
from shoal.model.step.executor import ModelExecutor
from tests.examples import examples
from tests.fakes import Harness
from tests.model.batches import Paged
from tests.model.oracles import random_record, random_steps, run_chunks, run_whole, sequences

pytestmark = pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")

POOL = {"num_blocks": 100, "block_size": 16}
FORMATS = ["float16", "bfloat16", *BLOCKS]
# Of a block, where its float16 scales are.
SCALES = {name: [0, 2] for name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")} | {"Q6_K": [208]}


def stored(name: str, shape: tuple[int, ...], seed: int) -> Array:
    """A random matrix in the format, of any bits that stand for numbers of ordinary size."""
    rng = np.random.default_rng(seed)
    if name == "float16":
        return (rng.standard_normal(shape) * 0.1).astype(np.float16)
    if name == "bfloat16":
        return (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    size, width = BLOCKS[name]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // size, width), np.uint8)
    for offset in SCALES.get(name, [0]):
        scales = rng.uniform(-0.01, 0.01, blocks.shape[:-1]).astype(np.float16)
        blocks[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    return blocks.view(block_dtype(name))[..., 0]


def with_arrays(part: Any, change: Callable[[Array], Array]) -> Any:
    """The record, or a part of it, with other arrays; what was one array stays one."""
    if isinstance(part, np.ndarray):
        return change(part)
    if isinstance(part, tuple):
        return tuple(with_arrays(one, change) for one in part)
    if is_dataclass(part) and type(part).__module__.endswith("record"):
        return replace(part, **{field.name: with_arrays(getattr(part, field.name), change) for field in fields(part)})  # type: ignore[type-var]
    return part


def record_in(names: list[str], **shape: Any) -> ModelRecord:
    """A model whose matrices have these formats in turns, as far as their depth is a multiple of a block."""
    changed: dict[int, Array] = {}

    def change(array: Array) -> Array:
        if id(array) not in changed:
            name = names[len(changed) % len(names)]
            fits = array.ndim == 2 and array.shape[-1] % BLOCKS.get(name, (1, 0))[0] == 0
            changed[id(array)] = stored(name, array.shape, len(changed)) if fits else array
        return changed[id(array)]

    return with_arrays(random_record(**shape), change)


def expanded(record: ModelRecord) -> ModelRecord:
    """The same model in float32."""
    arrays = {id(array): in_float32(array) for *_, array in record.tensors()}
    return with_arrays(record, lambda array: arrays[id(array)])


SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 105, "num_heads": 4, "head_dim": 64},
    # Queries and keys share a panel, and the last panel of each matrix has columns to spare.
    "mixture": {
        **{"hidden_size": 256, "intermediate_size": 256, "vocab_size": 97, "tie_word_embeddings": False},
        **{"num_heads": 5, "num_kv_heads": 1, "head_dim": 24, "num_experts": 5, "num_experts_per_tok": 3},
    },
    # No size is a multiple of a vector's lanes, nor of a pair.
    "odd": {"hidden_size": 37, "intermediate_size": 23, "vocab_size": 101, "num_heads": 6, "num_kv_heads": 3},
}


@cache
def both(names: tuple[str, ...], shape: str) -> tuple[ModelRecord, ModelRecord]:
    record = record_in([*names], **SHAPES[shape])
    return record, expanded(record)


@cache
def backend_of(names: tuple[str, ...], shape: str, *, in_floats: bool, isa: str | None = None) -> NativeBackend:
    return NativeBackend(both(names, shape)[in_floats], **POOL, num_threads=2, isa=isa)


# Rows of 37 are not whole blocks.
CASES = [(name, shape) for name in FORMATS for shape in SHAPES if shape != "odd" or name not in BLOCKS]


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_logits_have_the_bits_of_float32(name: str, shape: str, isa: str) -> None:
    """With 1 to 40 rows, and 1 expert row and more."""
    texts = sequences(1, 40, 24, 13, 11, 8, 5, 2, 1)
    expected, found = (
        {key: run_whole(backend, Paged(**POOL), text) for key, text in texts.items()}
        for backend in (
            backend_of((name,), shape, in_floats=True),
            backend_of((name,), shape, in_floats=False, isa=isa),
        )
    )
    for key, logits in expected.items():
        assert np.isfinite(logits).all() and np.ptp(logits) > 0
        np.testing.assert_array_equal(found[key].view(np.int32), logits.view(np.int32))


def serve(backend: NativeBackend, num_requests: int, *, num_seqs: int, chunk: int) -> Harness:
    """Requests, greedy and drawn, all with log-probabilities, by a whole engine."""
    rng = np.random.default_rng(3)
    executor = ModelExecutor(backend, max_num_seqs=num_seqs, max_model_len=64, block_size=POOL["block_size"])
    limits = {"max_num_seqs": num_seqs, "max_chunk_tokens": chunk, "max_num_batched_tokens": 100}
    harness = Harness(executor=executor, max_model_len=64, **POOL, **limits)
    for index in range(num_requests):
        prompt = rng.integers(0, backend.vocab_size, int(rng.integers(1, 50))).tolist()
        how = {"seed": index, "temperature": 0.5 * (index % 3), "num_logprobs": 2, "max_tokens": 1 + index % 7}
        harness.add(f"r{index}", prompt, **how)
    harness.drain()
    return harness


@pytest.mark.parametrize(
    ("num_requests", "isa"),
    [(30, None), *(pytest.param(200, isa, marks=pytest.mark.long) for isa in supported_isas())],
)
@pytest.mark.parametrize("name", FORMATS)
def test_tokens_and_log_probabilities_are_those_of_float32(name: str, num_requests: int, isa: str | None) -> None:
    """In other batches and chunks, too."""
    expected = serve(backend_of((name,), "mixture", in_floats=True), num_requests, num_seqs=16, chunk=50)
    stored_backend = backend_of((name,), "mixture", in_floats=False, isa=isa)
    found = serve(stored_backend, num_requests, num_seqs=3 + len(name), chunk=7)
    assert len(expected.token_ids) == num_requests and found.token_ids == expected.token_ids
    assert found.logprobs == expected.logprobs


# As in Q4_K_M, and worse: three sources of a panel, and gates that differ from what they gate.
@pytest.mark.parametrize("shape", ["tied", "mixture"])
@pytest.mark.parametrize("names", [("Q4_K", "Q4_K", "Q6_K"), ("float16", "Q8_0"), tuple(FORMATS)])
def test_formats_that_are_mixed(names: tuple[str, ...], shape: str) -> None:
    texts = sequences(2, 50, 9, 1, 30)
    expected = {
        key: run_whole(backend_of(names, shape, in_floats=True), Paged(**POOL), text) for key, text in texts.items()
    }
    for seed in range(3):
        steps = random_steps(seed, texts)
        found = run_chunks(backend_of(names, shape, in_floats=False), Paged(**POOL), texts, steps)
        for key, logits in expected.items():
            np.testing.assert_array_equal(found[key].view(np.int32), logits.view(np.int32))


@pytest.mark.parametrize("name", BLOCKS)
@settings(max_examples=examples(20), derandomize=True, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), extreme=st.booleans())
def test_embeddings_are_the_numbers_of_the_library(name: str, seed: int, extreme: bool) -> None:
    """Any bits of codes and factors, and any finite scale."""
    size, width = BLOCKS[name]
    rng = np.random.default_rng(seed)
    blocks = rng.choice(np.array([0, 255], np.uint8), (32, 256 // size, width)) if extreme else None
    blocks = rng.integers(0, 256, (32, 256 // size, width), np.uint8) if blocks is None else blocks
    for offset in SCALES.get(name, [0]):
        blocks[..., offset + 1] &= 0b1011_1011  # an exponent below the one of infinity
    embedding = blocks.view(block_dtype(name))[..., 0]
    assert count_numbers(embedding) == 32 * 256
    for is_tied in (True, False):
        found = embedded(embedding, is_tied=is_tied)
        expected = in_float32(embedding) + np.float32(0)  # blocks add zeros, which changes the sign of -0
        np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))


def embedded(embedding: Array, *, is_tied: bool) -> Array:
    """What a model without layers, norm and positions has as hidden states of all tokens."""
    record = random_record(
        hidden_size=256, vocab_size=len(embedding), num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2,
        intermediate_size=1, tie_word_embeddings=is_tied, parts={"no_last_norm"},
    )  # fmt: skip
    zeros = with_arrays(record, lambda array: np.zeros_like(array) if array.ndim == 2 else array)
    head = replace(record.head, weight=embedding if is_tied else in_float32(embedding))
    backend = NativeBackend(replace(zeros, embedding=embedding, head=head), num_blocks=4, block_size=16, num_threads=1)
    batch = Paged(4, 16).batch([("all", range(len(embedding)), 0)])
    batch.hidden = np.zeros((len(embedding), 256), np.float32)
    backend.forward(batch)
    return batch.hidden
