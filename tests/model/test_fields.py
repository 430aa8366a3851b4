"""Random models over all fields of the record: what a backend computes does not depend on chunks and company.

Families combine few of the fields; here any stand beside any others, at odd sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch

from shoal.model.architecture import LatentConfig, RopeConfig, Temperature
from shoal.model.backends.native_backend import NativeBackend
from shoal.model.backends.native_library import supported_isas
from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.record import ModelRecord
from shoal.model.step.batch import Backend
from tests.model.batches import Paged
from tests.model.oracles import random_record, random_steps, run_chunks, sequences

POOL: dict[str, Any] = {"num_blocks": 256, "block_size": 16}
SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 60))]
BACKENDS: dict[str, Callable[..., Backend]] = {
    "torch": TorchBackend,
    "torch-bfloat16": partial(TorchBackend, dtype="bfloat16"),
    "native": partial(NativeBackend, num_threads=2),
}


class _Chance:
    """Choices that a seed makes."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def one(self, *values: Any) -> Any:
        return values[self._rng.integers(len(values))]

    def some(self, *values: str) -> set[str]:
        return {value for value in values if self._rng.random() < 0.4}

    def maybe(self, **fields: Any) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if self._rng.random() < 0.4}


@cache
def model(seed: int) -> ModelRecord:
    chance = _Chance(seed)
    num_heads, num_kv_heads = chance.one((7, 1), (4, 2), (6, 3), (3, 3))
    head_dim, gated = chance.one(8, 10, 24), chance.one(True, True, False)
    fields: dict[str, Any] = {
        "num_layers": 3,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_size": chance.one(32, 56, 72),
        "intermediate_size": chance.one(20, 37, 72),
        "vocab_size": chance.one(97, 1003),
        "tie_word_embeddings": chance.one(True, False),
        "gated": gated,
        "activation": chance.one("silu", "gelu", "gelu_tanh", "relu", "relu2", *(["clamped_silu"] if gated else [])),
        "norm": chance.one("rms", "layer"),
        "parallel": chance.one(True, False),
        "qk_norm_eps": 1e-6,
    }
    fields |= chance.maybe(logit_softcap=3.0, embedding_multiplier=2.5, residual_multiplier=0.3, logits_multiplier=0.5)
    parts = chance.some("feed_forward_bias", "head_bias", "norm_bias", "no_gain", "embedding_norm", "positions")
    parts |= chance.some("qkv_bias", "output_bias", "no_last_norm")
    if fields["parallel"]:
        parts |= chance.some("shared_norm")
    else:
        fields["norm_after_sum"] = chance.one(True, False, False)
        parts |= {chance.one("output_norms", "only_output_norms", "none")} - {"none"}
    if chance.one(True, False, False):
        latent = LatentConfig(
            rank=24, rope_dim=8, nope_dim=12, value_dim=chance.one(10, 12), query_rank=chance.one(0, 16)
        )
        fields |= {"latent": latent, "num_kv_heads": num_heads}
    else:
        fields |= _attention(chance, num_heads, head_dim)
        parts |= chance.some("sinks")
    if chance.one(True, False):
        fields |= _mixture(chance)
        parts |= chance.some("router_bias", "expert_bias", "correction", "shared_gate")
    return random_record(seed, parts, **fields)


def _attention(chance: _Chance, num_heads: int, head_dim: int) -> dict[str, Any]:
    scaled = RopeConfig(1e4, 4, "yarn", factors=(1.0, 3.5), attention_factor=1.1)
    fields: dict[str, Any] = {
        "qk_norm": chance.one("none", "head", "whole"),
        "qk_norm_kind": chance.one("rms", "layer"),
        "qk_norm_after_rope": chance.one(True, False),
    }
    fields |= chance.maybe(attention_scale=0.2, attention_softcap=4.0, keeps_all=True)
    fields |= chance.maybe(alibi_slopes=tuple(2.0 ** -np.arange(1, 1 + num_heads)))
    fields |= chance.maybe(rope=[chance.one(None, scaled), RopeConfig(1e4, head_dim)])
    fields |= chance.maybe(temperature=[Temperature(0.2, 16, chance.one(0, 1)), None])
    return fields | chance.maybe(window=[chance.one(5, 40, 200), 0, 0], chunk=[0, 0, chance.one(8, 150)])


def _mixture(chance: _Chance) -> dict[str, Any]:
    num_experts, num_experts_per_tok = chance.one((3, 1), (16, 4))
    fields: dict[str, Any] = {
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "score": chance.one("softmax", "sigmoid"),
        "renormalise": chance.one(True, False),
    }
    if num_experts == 16:
        fields |= chance.maybe(num_groups=4) and {
            "num_groups": 4,
            "num_chosen_groups": 2,
            "group_score": chance.one("max", "top2"),
        }
    return fields | chance.maybe(scale=2.5, share_on_input=True, shared_size=20)


def make(name: str, record: ModelRecord) -> Backend:
    if name == "native" and not supported_isas():
        pytest.skip("the native backend is not built")
    return BACKENDS[name](record, **POOL)


def pages_of(record: ModelRecord) -> Paged:
    return Paged(**POOL, num_groups=len(record.config.cache_groups))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_chunks_and_neighbours(seed: int, name: str) -> None:
    record = model(seed)
    backend = make(name, record)
    texts = sequences(seed, 301, 12, 90, 3)
    alone = {
        text: run_chunks(backend, pages_of(record), {text: t}, [{text: len(t)}])[text] for text, t in texts.items()
    }
    torch.set_num_threads(2)
    together = run_chunks(backend, pages_of(record), texts, random_steps(seed, texts))
    for text in texts:
        assert np.isfinite(alone[text]).all()
        np.testing.assert_array_equal(together[text], alone[text])


@pytest.mark.parametrize("seed", SEEDS)
def test_native_equals_torch(seed: int) -> None:
    """In the plain steps of a sequence alone; the test above takes care of the others."""
    record = model(seed)
    ((text, tokens),) = sequences(seed, 301).items()
    expected, found = (
        run_chunks(make(name, record), pages_of(record), {text: tokens}, [{text: 300}, {text: 1}])[text]
        for name in ("torch", "native")
    )
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("name", ["torch", "native"])
@pytest.mark.parametrize("kind", ["window", "chunk"])
def test_what_no_query_sees_is_never_read(name: str, kind: str) -> None:
    """Blocks are given back: their entries become -1, and another sequence leaves NaN there."""
    fields: dict[str, Any] = {kind: [10, 0]}
    record = random_record(num_layers=4, **fields)
    embedding = np.array(record.embedding)
    embedding[95] = np.nan
    backend, pages = make(name, replace(record, embedding=embedding)), Paged(**POOL, num_groups=2)
    tokens = [token % 95 for token in sequences(3, 160)["sequence-0"]]
    expected = run_chunks(backend, pages, {"text": tokens}, [{"text": len(tokens)}])["text"]
    given_back = pages.tables["text"][0 : 128 // POOL["block_size"] * 2 : 2]
    pages.free += given_back
    backend.forward(pages.batch([("poison", [95] * 64, 0)]))
    assert set(pages.tables["poison"]) == set(given_back)
    for count in (1, 3, 20):
        start = len(tokens) - count
        batch = pages.batch([("text", tokens[start:], start)])
        batch.block_tables[:, : 2 * len(given_back) : 2] = -1
        np.testing.assert_array_equal(backend.forward(batch), expected[start:])


def test_the_first_layers_alone() -> None:
    """As drafting computes them, also where they are of fewer cache groups than the model."""
    record = random_record(window=[10, 0], num_layers=4)
    config = record.config
    first = replace(record, config=replace(config, layers=config.layers[:1]), layers=record.layers[:1])
    assert (len(config.cache_groups), len(first.config.cache_groups)) == (2, 1)
    tokens = sequences(5, 70)["sequence-0"]
    expected = make("torch", first).forward(pages_of(first).batch([("text", tokens, 0)]))
    found = make("torch", record).forward(pages_of(record).batch([("text", tokens, 0)]), 1)
    np.testing.assert_array_equal(found, expected)
