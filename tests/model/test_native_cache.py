"""The native backend's KV cache in 8 bits: how it rounds, and attention over what it has rounded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.model.architecture import LatentConfig
from shoal.model.backends import torch_attention
from shoal.model.backends.native_backend import NativeBackend
from shoal.model.backends.native_library import supported_isas
from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.numbers import Array
from shoal.model.record import Linear, ModelRecord
from shoal.model.step.batch import Float32
from shoal.scheduler.errors import ConfigError
from tests.examples import examples
from tests.model.oracles import random_record, random_steps, run_chunks, run_whole, sequences

pytestmark = pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")

POOL: dict[str, Any] = {"num_blocks": 100, "block_size": 16}
WIDTH = 11  # of a head: no vector is full
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "odd": {"num_heads": 7, "num_kv_heads": 1, "head_dim": 10},
    "one-head-of-many": {"num_heads": 32, "num_kv_heads": 1, "head_dim": 6},
    "windows-and-sinks": {"window": [20, 0, 270], "num_layers": 3, "parts": {"sinks"}},
    "chunks": {"chunk": [130, 0], "attention_softcap": 5.0},
    "alibi": {"alibi_slopes": (0.5, 0.25, 0.125, 0.0625), "rope": None},
}


def rounded(vectors: torch.Tensor) -> torch.Tensor:
    """Each vector as 255 multiples of its greatest magnitude / 127."""
    scales = vectors.abs().amax(-1, keepdim=True) / 127
    return torch.round(vectors / scales) * scales


@pytest.mark.parametrize("name", FIELDS)
def test_attention_is_that_over_rounded_vectors(name: str, paged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch computes both, with vectors rounded and as they are; where it is near a tie, a code may be another one."""
    record = random_record(**{"max_position_embeddings": 400} | FIELDS[name])
    texts = sequences(1, 330, 9, 70)
    pages = paged(**POOL, num_groups=len(record.config.cache_groups))
    backend = NativeBackend(record, **POOL, num_threads=2, kv_cache_dtype="int8")
    found = run_chunks(backend, pages, texts, random_steps(1, texts))

    def error() -> float:
        pages = paged(**POOL, num_groups=len(record.config.cache_groups))
        whole = {name: run_whole(TorchBackend(record, **POOL), pages, text) for name, text in texts.items()}
        return float(np.mean([np.abs(found[name] - whole[name]).mean() for name in texts]))

    from_exact, attend = error(), torch_attention.attend
    monkeypatch.setattr(torch_attention, "attend", lambda q, kv, *rest: attend(q, rounded(kv), *rest))
    assert error() < from_exact / 20
    assert from_exact < 0.05


def value_alone(value: Array) -> ModelRecord:
    """A model whose hidden states are the value of the first position, as the cache has it."""
    shape = {"hidden_size": len(value), "head_dim": len(value), "num_heads": 1, "num_kv_heads": 1, "num_layers": 1}
    record = random_record(**shape, parallel=True, parts={"shared_norm", "no_last_norm"})
    (layer,), zeroes = record.layers, np.zeros((len(value), len(value)), np.float32)
    attention = replace(
        layer.attention,
        q_proj=Linear(zeroes),
        v_proj=Linear(zeroes, value),
        o_proj=Linear(np.eye(len(value), dtype=np.float32)),
    )
    silent = replace(layer.feed_forward, down_proj=Linear(np.zeros_like(layer.feed_forward.down_proj.weight)))
    layer = replace(layer, attention=attention, feed_forward=silent)
    return replace(record, embedding=np.zeros_like(record.embedding), layers=(layer,))


def kept(value: Array, paged: Any, isa: str) -> Float32:
    """What the cache makes of a value."""
    pool = {"num_blocks": 1, "block_size": 16}
    backend = NativeBackend(value_alone(value), **pool, num_threads=1, kv_cache_dtype="int8", isa=isa)
    batch = paged(**pool).batch([("a", [0], 0)])
    batch.hidden = np.empty((1, len(value)), np.float32)
    backend.forward(batch)
    (hidden,) = batch.hidden
    return hidden


def numbers(least: float, most: float) -> st.SearchStrategy[float]:
    magnitudes = st.floats(np.float32(least), np.float32(most), width=32)
    return st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda x: -x))


# `paged` is a class, which no example can leave in another state.
@pytest.mark.parametrize("isa", supported_isas())
@settings(
    max_examples=examples(200),
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    value=st.one_of(
        st.lists(st.integers(-254, 254).map(lambda x: x / 2), min_size=WIDTH - 1, max_size=WIDTH - 1).map(
            lambda halves: [127.0, *halves]
        ),
        *(st.lists(numbers(*ends), min_size=WIDTH, max_size=WIDTH) for ends in ((1e-3, 10), (1e-35, 1e38))),
    )
)
def test_each_vector_is_rounded_to_the_nearest_of_255_multiples(value: list[float], isa: str, paged: Any) -> None:
    """Ties to even, as numpy rounds them."""
    exact = np.array(value, np.float32)
    greatest = np.abs(exact).max()
    scale = greatest / np.float32(127)
    codes = np.rint(exact * (np.float32(127) / greatest)) if greatest > 0 else exact
    np.testing.assert_array_equal(kept(exact, paged, isa), codes * scale)
    assert np.all(np.abs(codes * scale - exact) <= np.float64(scale) * 0.5001)


@pytest.mark.parametrize("isa", supported_isas())
def test_vectors_too_small_or_not_finite(isa: str, paged: Any) -> None:
    """Below 2**-119 a vector is zero; with a number that is not finite it is NaN."""
    rng = np.random.default_rng(1)
    for exponent in (-149, -140, -127, -120):
        small = rng.uniform(-1, 1, WIDTH).astype(np.float32) * np.float32(2.0**exponent)
        assert not kept(small, paged, isa).any()
    for lost in (np.inf, -np.inf, np.nan):
        value = rng.normal(size=WIDTH).astype(np.float32)
        value[4] = lost
        assert np.isnan(kept(value, paged, isa)).all()


def test_latent_attention_has_no_cache_of_bytes() -> None:
    record = random_record(latent=LatentConfig(rank=8, rope_dim=4, nope_dim=8, value_dim=8), num_kv_heads=4)
    with pytest.raises(ConfigError, match="kv_cache_dtype int8 is not for latent attention") as caught:
        NativeBackend(record, **POOL, kv_cache_dtype="int8")
    assert caught.value.param == "kv_cache_dtype"
