"""Latent attention in the native backend: its numbers, its bits, and what it does not do."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.model.architecture import LatentConfig, Temperature
from shoal.model.backends.native_backend import NativeBackend
from shoal.model.backends.native_library import has_bfloat16, supported_isas
from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.numbers import Array
from shoal.model.record import FeedForward, LatentAttention, Linear, ModelRecord, Norm
from shoal.scheduler.errors import CheckpointError
from tests.model.oracles import random_record, random_steps, run_chunks, run_whole, sequences

pytestmark = pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")

Float64 = NDArray[np.float64]

POOL: dict[str, Any] = {"num_blocks": 200, "block_size": 16}
# LatentAttention::kStretch in latent.h.
STRETCH = 256
# "odd": no size fills a vector, and rows of three heads fill no tile.  "lite" has the latent of DeepSeek-V2-Lite.
MODELS: dict[str, dict[str, Any]] = {
    "odd": {"num_heads": 3, "latent": LatentConfig(rank=24, rope_dim=8, nope_dim=12, value_dim=20)},
    "low-rank-queries": {"num_heads": 4, "latent": LatentConfig(32, 16, 16, 16, query_rank=20), "parts": ["qkv_bias"]},
    "one-head": {"num_heads": 1, "latent": LatentConfig(rank=7, rope_dim=2, nope_dim=5, value_dim=3)},
    "many-heads": {"num_heads": 40, "latent": LatentConfig(rank=16, rope_dim=4, nope_dim=6, value_dim=6)},
    "lite": {"num_heads": 16, "latent": LatentConfig(rank=512, rope_dim=64, nope_dim=24, value_dim=24)},
    "no-gain": {"num_heads": 2, "latent": LatentConfig(20, 4, 8, 8, query_rank=12), "parts": ["no_gain"]},
    "temperature": {"temperature": Temperature(0.2, 32), "latent": LatentConfig(24, 8, 8, 8), "attention_scale": 0.2},
    "no-rope": {"rope": [None, "default"], "latent": LatentConfig(24, 8, 8, 8)},
}
NUMBERS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16-cache": {"kv_cache_dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8", "kv_cache_dtype": "float16"},
}
if supported_isas()[:1] == ("avx512",) and not has_bfloat16():
    del NUMBERS["bfloat16"]

each_model = pytest.mark.parametrize("model", MODELS)
each_numbers = pytest.mark.parametrize("numbers", NUMBERS)


@cache
def record_of(model: str) -> ModelRecord:
    fields = dict(MODELS[model])
    some_turn = fields.pop("rope", None)
    record = random_record(**{"num_kv_heads": fields.get("num_heads", 4)} | fields)
    if some_turn:
        first, *rest = record.config.layers
        record = replace(record, config=replace(record.config, layers=(replace(first, rope=None), *rest)))
    return record


@cache
def backend_of(model: str, numbers: str, *, num_threads: int = 2, isa: str | None = None) -> NativeBackend:
    return NativeBackend(record_of(model), **POOL, **NUMBERS[numbers], num_threads=num_threads, isa=isa)


@pytest.fixture
def pages(paged: Any) -> Any:
    return paged(**POOL)


# -- the numbers -------------------------------------------------------------------------------------------------------


def linear(x: Float64, layer: Linear) -> Float64:
    y: Float64 = x @ layer.weight.astype(np.float64).T
    if layer.bias is not None:
        y += layer.bias
    return y


def rms_norm(x: Float64, norm: Norm | None, eps: float) -> Float64:
    y: Float64 = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)
    if norm is not None and norm.gain is not None:
        y *= norm.gain
    return y


def turn(x: Float64, theta: float) -> Float64:
    """RoPE of [num_tokens, any, dim]."""
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(len(x)), theta ** (-np.arange(half) / half))[:, None]
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def attend(record: ModelRecord, index: int, x: Float64) -> Float64:
    """Latent attention as the paper has it: each head's keys and values are made of the latents."""
    config, layer, block = record.config, record.config.layers[index], record.layers[index].attention
    assert config.latent and isinstance(block, LatentAttention)
    rank, nope, eps = config.latent.rank, config.latent.nope_dim, config.latent.norm_eps
    queries = rms_norm(linear(x, block.q_down), block.q_down_norm, eps) if block.q_down else x
    queries = linear(queries, block.q_proj).reshape(len(x), config.num_heads, -1)
    down = linear(x, block.kv_down)
    latents, turning = rms_norm(down[:, :rank], block.kv_norm, eps), down[:, None, rank:]
    turned = queries[..., nope:]
    if layer.rope:
        turned, turning = turn(turned, layer.rope.theta), turn(turning, layer.rope.theta)
    keys = np.einsum("tr,hdr->thd", latents, block.k_up.astype(np.float64))
    values = np.einsum("tr,hdr->thd", latents, block.v_up.astype(np.float64))
    scores = np.einsum("qhd,khd->hqk", queries[..., :nope], keys) + np.einsum("qhd,kd->hqk", turned, turning[:, 0])
    scores *= config.attention_scale
    if layer.temperature:
        periods = np.arange(len(x)) // layer.temperature.length
        scores *= (1 + layer.temperature.scale * np.log1p(periods))[:, None]
    scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return linear(np.einsum("hqk,khd->qhd", shares, values).reshape(len(x), -1), block.o_proj)


def expected_logits(record: ModelRecord, tokens: list[int]) -> Float64:
    """The logits of all tokens of a sequence, in float64."""
    hidden, eps = record.embedding[tokens].astype(np.float64), record.config.norm_eps
    for index, layer in enumerate(record.layers):
        hidden = hidden + attend(record, index, rms_norm(hidden, layer.input_norm, eps))
        block, x = layer.feed_forward, rms_norm(hidden, layer.feed_forward_norm, eps)
        assert isinstance(block, FeedForward) and block.gate_proj
        gate = linear(x, block.gate_proj)
        hidden = hidden + linear(gate / (1 + np.exp(-gate)) * linear(x, block.up_proj), block.down_proj)
    return linear(rms_norm(hidden, record.norm, eps), record.head)


@each_model
def test_logits_through_chunks_in_mixed_batches(model: str, pages: Any) -> None:
    texts = sequences(1, 290, 9, 33)
    logits = run_chunks(backend_of(model, "float32"), pages, texts, random_steps(1, texts))
    for name, tokens in texts.items():
        np.testing.assert_allclose(logits[name], expected_logits(record_of(model), tokens), atol=1e-4, rtol=0)


@each_model
def test_logits_equal_those_of_the_torch_backend(model: str, pages: Any) -> None:
    torch_backend = TorchBackend(record_of(model), **POOL)
    (tokens,) = sequences(7, STRETCH + 30).values()
    expected = run_whole(torch_backend, pages, tokens)
    np.testing.assert_allclose(run_whole(backend_of(model, "float32"), pages, tokens), expected, atol=1e-4, rtol=0)


@each_model
@pytest.mark.parametrize(("numbers", "atol"), [("float16-cache", 0.02), ("bfloat16", 0.1), ("int8", 0.3)])
def test_fewer_bits_stay_near(model: str, numbers: str, atol: float, pages: Any) -> None:
    (tokens,) = sequences(2, 60).values()
    logits = run_whole(backend_of(model, numbers), pages, tokens)
    expected = expected_logits(record_of(model), tokens)
    np.testing.assert_allclose(logits, expected, atol=atol * np.abs(expected).max(), rtol=0)
    assert np.abs(logits - expected).max() > 1e-4  # they are what was asked for


# -- the bits ----------------------------------------------------------------------------------------------------------


@each_model
@each_numbers
def test_same_bits_in_chunks_and_company(model: str, numbers: str, pages: Any) -> None:
    """With one thread and three, which divide a long context among them."""
    texts = sequences(3, 2 * STRETCH + 40, 17, STRETCH + 1)
    expected = {name: run_whole(backend_of(model, numbers), pages, text) for name, text in texts.items()}
    for num_threads in (1, 3):
        backend = backend_of(model, numbers, num_threads=num_threads)
        found = run_chunks(backend, pages, texts, random_steps(num_threads, texts))
        for name, logits in expected.items():
            np.testing.assert_array_equal(found[name], logits)
            pages.release(name)


@each_model
@each_numbers
def test_same_bits_on_every_instruction_set(model: str, numbers: str, pages: Any) -> None:
    (tokens,) = sequences(4, STRETCH + 30).values()
    best, *others = (run_whole(backend_of(model, numbers, isa=isa), pages, tokens) for isa in supported_isas())
    for logits in others:
        np.testing.assert_array_equal(logits, best)


@each_numbers
def test_around_the_borders_of_stretches(numbers: str, pages: Any) -> None:
    backend = backend_of("odd", numbers, num_threads=3)
    texts = sequences(5, 2 * STRETCH + 6)
    ((name, tokens),) = texts.items()
    expected = run_whole(backend, pages, tokens)
    run_chunks(backend, pages, texts, [{name: len(tokens)}])
    for end in (1, 5, *(border + offset for border in (STRETCH, 2 * STRETCH) for offset in (-1, 0, 1, 4))):
        for start in (end - 1, max(end - 5, 0)):
            logits = backend.forward(pages.batch([(name, tokens[start:end], start)]))
            np.testing.assert_array_equal(logits, expected[start:end])


@pytest.mark.parametrize("numbers", ["float32", "float16-cache"])
def test_what_is_not_finite_stays_with_its_sequence(numbers: str, pages: Any) -> None:
    """Slots of the cache that a sequence does not see may hold anything."""
    record = record_of("odd")
    embedding: Array = record.embedding.copy()
    embedding[95] = np.nan
    record = replace(record, embedding=embedding, head=Linear(record.embedding))
    backend = NativeBackend(record, **POOL, **NUMBERS[numbers], num_threads=1)
    texts = {name: [token % 95 for token in text] for name, text in sequences(6, 39, 25).items()}
    expected = {name: run_whole(backend, pages, text) for name, text in texts.items()}
    assert np.isnan(run_whole(backend, pages, [95] * 3000)).all()
    found = run_chunks(backend, pages, texts, random_steps(6, texts))
    for name, logits in expected.items():
        np.testing.assert_array_equal(found[name], logits)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"), [("window", 8), ("chunk", 8), ("attention_softcap", 5.0), ("alibi_slopes", (0.5,) * 4)]
)
def test_fields_that_do_not_go_with_it_are_refused_by_name(field: str, value: Any) -> None:
    record = random_record(latent=LatentConfig(16, 8, 8, 8), num_kv_heads=4, **{field: value})
    with pytest.raises(CheckpointError, match=field):
        NativeBackend(record, **POOL)
