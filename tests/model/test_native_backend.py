"""The native backend against transformers and the torch backend, and how it takes its steps."""

from __future__ import annotations

import argparse
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from tokenizers import Tokenizer

from shoal.model.backends.native_backend import NativeBackend
from shoal.model.backends.native_library import MAX_EXPERTS, MAX_HEAD_DIM, has_bfloat16, supported_isas
from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.numbers import BLOCKS, block_dtype, in_float32, shape_of
from shoal.model.record import Linear, ModelRecord, Norm
from shoal.model.step.batch import SamplingBatch
from shoal.model.step.sampling import sample_reference
from tests.model.oracles import (
    BUNDLED,
    SHAPES,
    SMOLLM2,
    random_record,
    random_steps,
    run_chunks,
    run_whole,
    sequences,
)
from tests.model.tiny import expected_logits

pytestmark = pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")
needs_bfloat16 = pytest.mark.skipif(
    supported_isas()[:1] == ("avx512",) and not has_bfloat16(), reason="the machine has no AVX512-BF16"
)

POOL = {"num_blocks": 64, "block_size": 16}
# What fills no vector, and groups of heads that are more than a tile's rows.
ODD_SHAPES: dict[str, dict[str, Any]] = {
    "llama-odd": {"hidden_size": 39, "intermediate_size": 23, "num_attention_heads": 3, "num_key_value_heads": 1}
    | {"head_dim": 10, "vocab_size": 101},
    "llama-odd-tied": {"hidden_size": 33, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 2}
    | {"vocab_size": 97, "tie_word_embeddings": True},
    "llama-sixteen-to-one": {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 8},
    "llama-thirty-two-to-one": {"num_attention_heads": 32, "num_key_value_heads": 1, "head_dim": 6},
    "llama-widest-heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": MAX_HEAD_DIM},
    "mixtral-many": {"num_local_experts": 70, "num_experts_per_tok": 9, "intermediate_size": 17},
    "mixtral-most": {"num_local_experts": MAX_EXPERTS, "num_experts_per_tok": 1, "intermediate_size": 3},
}
ALL_SHAPES = SHAPES | ODD_SHAPES
NUMBERS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"quantization": "int8", "kv_cache_dtype": "float16"},
    "int8-cache": {"kv_cache_dtype": "int8"},
}

each_numbers = pytest.mark.parametrize("numbers", NUMBERS)


def make_backend(record: ModelRecord, numbers: str = "float32", **how: Any) -> NativeBackend:
    return NativeBackend(record, **{**POOL, "num_threads": 1, **NUMBERS[numbers], **how})


# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_logits_equal_transformers_through_chunks_in_mixed_batches(
    shape: str, tiny_checkpoint: Callable[..., Path], paged: Any
) -> None:
    folder = tiny_checkpoint(shape.partition("-")[0], **ALL_SHAPES[shape])
    backend = make_backend(load_checkpoint(folder), num_threads=2)
    texts = sequences(1, 150, 9, 33)
    logits = run_chunks(backend, paged(**POOL), texts, random_steps(1, texts))
    for name, tokens in texts.items():
        np.testing.assert_allclose(logits[name], expected_logits(folder, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("block_size", [16, 32, 48])
def test_long_and_short_contexts_in_one_batch(
    block_size: int, tiny_checkpoint: Callable[..., Path], paged: Any
) -> None:
    folder = tiny_checkpoint("llama", max_position_embeddings=1024)
    pool = {"num_blocks": 100, "block_size": block_size}
    backend = make_backend(load_checkpoint(folder), num_threads=2, **pool)
    texts = sequences(3, 700, 3, 130, 257, 1)
    names = list(texts)
    steps = [{name: len(texts[name]) - 1 for name in names[:4]}, dict.fromkeys(names, 1)]
    logits = run_chunks(backend, paged(**pool), texts, steps)
    for name, tokens in texts.items():
        np.testing.assert_allclose(logits[name], expected_logits(folder, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("model", ["bundled", "smollm2"])
def test_logits_equal_those_of_the_torch_backend(model: str, source: list[int], paged: Any) -> None:
    record = load_checkpoint(BUNDLED) if model == "bundled" else random_record(**SMOLLM2, vocab_size=4096)
    expected = run_whole(TorchBackend(record, **POOL), paged(**POOL), source[:600])
    found = run_whole(make_backend(record, num_threads=2), paged(**POOL), source[:600])
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpoints_of_16_bits(dtype: torch.dtype, tiny_model: Callable[..., Any], paged: Any, tmp_path: Path) -> None:
    """Nothing is lost of them: they are computed in float32."""
    tiny_model("mixtral", hidden_size=40).to(dtype).save_pretrained(tmp_path, max_shard_size="30KB")
    backend = make_backend(load_checkpoint(tmp_path))
    (tokens,) = sequences(2, 60).values()
    found = run_whole(backend, paged(**POOL), tokens)
    np.testing.assert_allclose(found, expected_logits(tmp_path, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", ["llama", "llama-odd", "llama-tied", "mixtral"])
def test_a_cache_of_16_bits_is_near(shape: str, tiny_checkpoint: Callable[..., Path], paged: Any) -> None:
    folder = tiny_checkpoint(shape.partition("-")[0], **ALL_SHAPES[shape])
    backend = make_backend(load_checkpoint(folder), kv_cache_dtype="float16")
    (tokens,) = sequences(2, 60).values()
    error = np.abs(run_whole(backend, paged(**POOL), tokens) - expected_logits(folder, tokens))
    assert 0 < error.mean() < 2e-3


@pytest.fixture(scope="module")
def source() -> list[int]:
    """Text that people wrote: 2,048 tokens of the standard library."""
    tokenizer: Any = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    token_ids: list[int] = tokenizer.encode(inspect.getsource(argparse), add_special_tokens=False).ids
    return token_ids[:2048]


@pytest.mark.parametrize(
    ("how", "most_divergence", "least_agreement"),
    [
        ({"quantization": "int8", "kv_cache_dtype": "float16"}, 1.5e-3, 0.975),
        ({"quantization": "int4"}, 0.04, 0.9),
        ({"kv_cache_dtype": "int8"}, 1e-3, 0.98),
        pytest.param({"dtype": "bfloat16"}, 2e-4, 0.99, marks=needs_bfloat16),
    ],
    ids=["int8", "int4", "int8-cache", "bfloat16"],
)
def test_fewer_bits_lose_little_of_the_bundled_model(
    how: dict[str, str], most_divergence: float, least_agreement: float, source: list[int], paged: Any
) -> None:
    record = load_checkpoint(BUNDLED)
    windows = [source[start : start + 512] for start in range(0, 2048, 512)]

    def logprobs(**how: Any) -> np.ndarray:
        backend = make_backend(record, num_threads=2, **how)
        logits = np.concatenate([run_whole(backend, paged(**POOL), window) for window in windows])
        return log_softmax(logits.astype(np.float64), axis=-1)

    exact, coarse = logprobs(), logprobs(**how)
    divergence = (np.exp(exact) * (exact - coarse)).sum(-1)
    assert 0 < divergence.mean() < most_divergence
    assert (exact.argmax(-1) == coarse.argmax(-1)).mean() > least_agreement


CODES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "random": lambda rng, size: rng.integers(-127, 128, size),
    "all-greatest": lambda rng, size: np.full(size, 127),
    "all-least": lambda rng, size: np.full(size, -127),
    "half-of-each": lambda rng, size: np.where(np.arange(size) < size // 2, 127, -127),
}


def head_alone(hidden: np.ndarray, head: np.ndarray) -> ModelRecord:
    """A model whose layers do nothing, so that `hidden`, the gain of its norm, is what the head reads."""
    vocab_size, depth = shape_of(head)
    shape = {"hidden_size": depth, "vocab_size": vocab_size, "intermediate_size": 1, "num_heads": 1}
    record = random_record(**shape, num_kv_heads=1, num_layers=1, tie_word_embeddings=False, norm_eps=0.0)
    (layer,) = record.layers
    silent = replace(
        layer,
        attention=replace(layer.attention, o_proj=Linear(np.zeros_like(layer.attention.o_proj.weight))),
        feed_forward=replace(layer.feed_forward, down_proj=Linear(np.zeros_like(layer.feed_forward.down_proj.weight))),
    )
    ones = np.ones_like(record.embedding)
    return replace(record, embedding=ones, layers=(silent,), norm=Norm(hidden), head=Linear(head))


@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q4_K"])
def test_products_of_bytes_are_those_of_exact_integers(name: str, isa: str, paged: Any) -> None:
    """Inputs are integers times powers of two, and so are scales: nothing is rounded, and logits are what the library's
    own numbers give.  Of codes there are random ones, and only the least or the greatest."""
    rng = np.random.default_rng(len(name))
    size, width = BLOCKS[name]
    blocks = rng.integers(0, 256, (60, 256 // size, width), np.uint8)
    blocks[20:40], blocks[40:] = 0x80, 0x7F
    if name == "Q4_K":
        blocks[..., 4:16] &= 3  # small factors: sums have 24 bits at most
    halves = blocks[..., : 2 if name in ("Q8_0", "Q4_0") else 4].view(np.float16)
    halves[...] = 2.0 ** rng.integers(-1, 1, halves.shape)
    head = blocks.view(block_dtype(name))[..., 0]
    for make in CODES.values():
        codes = make(rng, 256).astype(np.float32)
        codes[::32] = 127  # each group has its greatest
        hidden = (codes * 2.0 ** -rng.integers(0, 2, 8).repeat(32)).astype(np.float32)
        backend = make_backend(head_alone(hidden, head), "int8", num_blocks=1, isa=isa)
        logits = backend.forward(paged(1, 16).batch([("a", [0] * 13, 0)]))
        expected = in_float32(head).astype(np.float64) @ hidden
        np.testing.assert_array_equal(logits, np.broadcast_to(expected, logits.shape))


@pytest.mark.parametrize("depth", [1, 31, 33, 515])
def test_int8_rounds_what_is_no_block_yet(depth: int, paged: Any) -> None:
    """To within half a step of the greatest of 32, for inputs and weights each."""
    rng = np.random.default_rng(depth)
    hidden, head = rng.normal(size=depth).astype(np.float32), rng.normal(size=(37, depth)).astype(np.float32)
    backend = make_backend(head_alone(hidden, head), "int8", num_blocks=1)
    (logits,) = backend.forward(paged(1, 16).batch([("a", [0], 0)]))

    def steps(numbers: np.ndarray) -> np.ndarray:
        groups = np.zeros((*numbers.shape[:-1], -(-depth // 32) * 32))
        groups[..., :depth] = np.abs(numbers)
        return groups.reshape(*groups.shape[:-1], -1, 32).max(-1).repeat(32, -1)[..., :depth] / 127

    most = np.abs(hidden) @ steps(head).T + np.abs(head) @ steps(hidden)
    error = np.abs(logits - head.astype(np.float64) @ hidden)
    assert np.all(error <= 0.51 * most + (steps(head) * steps(hidden)).sum(-1))
    assert error.max() > 0


@needs_bfloat16
@pytest.mark.parametrize("isa", supported_isas())
@pytest.mark.parametrize("depth", [1, 2, 15, 576])
def test_bfloat16_products_are_those_of_rounded_numbers(depth: int, isa: str, paged: Any) -> None:
    """Torch rounds the numbers, and a chain of float32 adds their products: of each pair of depths the second first."""
    rng = np.random.default_rng(depth)
    hidden, head = rng.normal(size=depth).astype(np.float32), rng.normal(size=(37, depth)).astype(np.float32)
    x, weights = (torch.from_numpy(numbers).to(torch.bfloat16).double().numpy() for numbers in (hidden, head))
    sums = np.zeros(len(head), np.float32)
    order = [k for pair in range(0, depth, 2) for k in (pair + 1, pair) if k < depth]
    for k in order:
        sums = (sums + weights[:, k] * x[k]).astype(np.float32)
    backend = make_backend(head_alone(hidden, head), num_blocks=1, isa=isa, dtype="bfloat16")
    logits = backend.forward(paged(1, 16).batch([("a", [0] * 13, 0)]))
    np.testing.assert_array_equal(logits, np.broadcast_to(sums, logits.shape))


@needs_bfloat16
def test_every_float32_becomes_the_nearest_bfloat16(paged: Any) -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 50_000, np.uint32)
    ties, ends = bits & 0xFFFF0000 | 0x8000, np.array([0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF], np.uint32)
    numbers = np.concatenate([bits, ties, ends, ends | 0x80000000]).view(np.float32)
    numbers = numbers[~(np.abs(numbers) < np.finfo(np.float32).tiny)]  # hardware takes these for zero
    expected = torch.from_numpy(numbers).to(torch.bfloat16).float().numpy()
    backend = make_backend(head_alone(np.ones(1, np.float32), numbers[:, None]), num_blocks=1, dtype="bfloat16")
    (logits,) = backend.forward(paged(1, 16).batch([("a", [0], 0)]))
    np.testing.assert_array_equal(logits, expected)


# -- steps -------------------------------------------------------------------------------------------------------------


def test_execute_samples_from_the_wanted_rows_and_may_be_repeated(
    tiny_checkpoint: Callable[..., Path], paged: Any, sampling_batch: Callable[..., SamplingBatch]
) -> None:
    backend, pages = make_backend(load_checkpoint(tiny_checkpoint("mixtral"))), paged(**POOL)
    assert backend.vocab_size == 96
    batch = pages.batch([("a", [5, 6, 7], 0), ("b", [8], 0)], all_logits=False)
    logits = backend.forward(batch)
    assert logits.shape == (2, 96) and logits.dtype == np.float32
    for _ in range(2):
        out = backend.execute(batch, sampling_batch(2))
        assert out.token_ids.dtype == np.int32
        np.testing.assert_array_equal(out.token_ids, logits.argmax(-1))
    drawn = sampling_batch(2, temperature=1.0, top_p=0.9, seed=[1, 2], position=[3, 1], num_logprobs=2)
    expected = sample_reference(logits, drawn)
    np.testing.assert_array_equal(backend.execute(batch, drawn).token_ids, expected.token_ids)
    np.testing.assert_array_equal(backend.forward(batch), logits)


def test_more_rows_than_are_computed_at_once(paged: Any, sampling_batch: Callable[..., SamplingBatch]) -> None:
    """Model::kLogitsRows of model.h are; the rest follow."""
    backend, pages = make_backend(random_record(), num_threads=2), paged(**POOL)
    batch = pages.batch([(name, text, 0) for name, text in sequences(3, 100, 1, 52).items()])
    logits = backend.forward(batch)
    parts = [replace(batch, logits_indices=rows) for rows in np.split(batch.logits_indices, 3)]
    np.testing.assert_array_equal(np.concatenate([backend.forward(part) for part in parts]), logits)
    rows = np.arange(153)
    drawn = sampling_batch(153, temperature=1.0, seed=rows, position=rows, num_logprobs=1)
    found, expected = backend.execute(batch, drawn), sample_reference(logits, drawn)
    np.testing.assert_array_equal(found.token_ids, expected.token_ids)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


@each_numbers
def test_a_step_that_wants_no_logits(numbers: str, paged: Any, sampling_batch: Callable[..., SamplingBatch]) -> None:
    backend, pages = make_backend(random_record(), numbers), paged(**POOL)
    (prompt,) = sequences(4, 40).values()
    silent = replace(pages.batch([("a", prompt[:20], 0)]), logits_indices=np.empty(0, np.int32))
    assert backend.execute(silent, sampling_batch(0)).token_ids.shape == (0,)
    assert backend.forward(silent).shape == (0, 96)
    continued = backend.forward(pages.batch([("a", prompt[20:], 20)]))
    np.testing.assert_array_equal(continued, run_whole(backend, pages, prompt)[20:])


@pytest.mark.parametrize("num_experts", [0, 4])
@each_numbers
def test_nan_stays_in_its_sequence_and_leaves_with_it(
    numbers: str, num_experts: int, paged: Any, sampling_batch: Callable[..., SamplingBatch]
) -> None:
    """Through attention, whose blocks others use again, and through experts, which many sequences share."""
    record = random_record(num_experts=num_experts, num_experts_per_tok=num_experts // 2, tie_word_embeddings=False)
    embedding = np.array(record.embedding)
    embedding[95] = np.nan
    pool = {"num_blocks": 8, "block_size": 16}
    (healthy,) = sequences(5, 40).values()
    healthy = [token % 95 for token in healthy]
    expected = run_whole(make_backend(record, numbers, **pool), paged(**pool), healthy)
    backend, pages = make_backend(replace(record, embedding=embedding), numbers, **pool), paged(**pool)
    batch = pages.batch([("bad", [7, 95, *[9] * 60], 0), ("good", healthy, 0)])
    chosen = backend.execute(batch, sampling_batch(102)).token_ids
    assert chosen[1:62].tolist() == [-1] * 61
    np.testing.assert_array_equal(chosen[62:], expected.argmax(-1))
    np.testing.assert_array_equal(backend.forward(batch)[62:], expected)
    pages.release("bad")
    texts = {"next": healthy[:33], "and-next": healthy[:17]}  # every block is used again, the last ones in part
    steps = [{name: 1 for name, text in texts.items() if step < len(text)} for step in range(33)]
    for logits in run_chunks(backend, pages, texts, steps).values():
        np.testing.assert_array_equal(logits, expected[: len(logits)])
    assert not pages.free


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        *[("attention", name, np.nan) for name in ("q_proj", "v_proj", "o_proj")],
        *[("feed_forward", name, np.nan) for name in ("gate_proj", "down_proj")],
        (None, "head", np.nan),
        ("attention", "k_proj", np.inf),
        ("feed_forward", "up_proj", -np.inf),
    ],
)
@each_numbers
def test_weights_that_are_not_finite_are_not_rounded_away(
    numbers: str, part: str | None, name: str, value: float, paged: Any
) -> None:
    record = random_record(num_layers=1)
    (layer,) = record.layers
    owner: Any = getattr(layer, part) if part else record
    weights = np.array(getattr(owner, name).weight)
    weights[3, 1] = value
    changed = replace(owner, **{name: Linear(weights)})
    if part:
        changed = replace(record, layers=(replace(layer, **{part: changed}),))
    logits = run_whole(make_backend(changed, numbers), paged(**POOL), [4, 5, 6])
    assert not np.isfinite(logits).all(axis=-1).any()


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def busy_cores() -> Iterator[None]:
    """Other programs that want every core for themselves."""
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]
    yield
    for other in others:
        other.kill()
        other.wait()


@pytest.mark.usefixtures("busy_cores")
@pytest.mark.parametrize("num_threads", [2, 5])
def test_steps_end_and_are_right_while_others_want_the_cores(num_threads: int, paged: Any) -> None:
    record = load_checkpoint(BUNDLED)
    texts = sequences(6, 200, 30, 2)
    lone, backend = make_backend(record), make_backend(record, num_threads=num_threads)
    expected = {name: run_whole(lone, paged(**POOL), text) for name, text in texts.items()}
    steps = [{name: 1 for name, text in texts.items() if step < len(text)} for step in range(200)]
    found = run_chunks(backend, paged(**POOL), texts, steps)
    for name in texts:
        np.testing.assert_array_equal(found[name], expected[name])


def test_backends_come_and_go(paged: Any) -> None:
    """Their threads end with them, asleep or awake."""
    record = random_record()
    batch = paged(**POOL).batch([("a", [1, 2, 3], 0)])
    num_threads = len(list(Path("/proc/self/task").iterdir()))
    expected = make_backend(record).forward(batch)
    for _ in range(50):
        np.testing.assert_array_equal(make_backend(record, num_threads=4).forward(batch), expected)
    assert len(list(Path("/proc/self/task").iterdir())) == num_threads
