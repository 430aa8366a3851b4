"""Each field of the record beyond Llama's on the native backend: against torch, and the bits of its results."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from shoal.model.architecture import RopeConfig, Temperature
from shoal.model.backends.native_backend import NativeBackend
from shoal.model.backends.native_library import supported_isas
from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.record import ModelRecord
from tests.model.oracles import random_record, random_steps, run_chunks, run_whole, sequences

pytestmark = pytest.mark.skipif(not supported_isas(), reason="the native backend is not built")

POOL: dict[str, Any] = {"num_blocks": 200, "block_size": 16}
MIXTURE = {"num_experts": 6, "num_experts_per_tok": 2}
HALF = RopeConfig(10_000.0, 4)
LAYER_NORM = {"norm": "layer", "parts": {"norm_bias"}}
BIASES = {"qkv_bias", "output_bias", "feed_forward_bias", "head_bias"}

FIELDS: dict[str, dict[str, Any]] = {
    "layer-norm": LAYER_NORM,
    "norms-without-gain": {"norm": "layer", "parts": {"no_gain"}},
    "norms-after-too": {"parts": {"output_norms"}},
    "norms-only-after": {"parts": {"only_output_norms"}},
    "norms-after-the-sum": LAYER_NORM | {"norm_after_sum": True},
    "no-last-norm": {"parts": {"no_last_norm"}},
    "parallel": {"parallel": True},
    "parallel-with-one-norm": {"parallel": True, "parts": {"shared_norm", "norm_bias"}, "norm": "layer"},
    "parallel-mixture": MIXTURE | {"parallel": True, "parts": {"shared_norm"}},
    "norm-of-each-head": {"qk_norm": "head", "head_dim": 10},
    "norm-of-all-heads": {"qk_norm": "whole", "num_heads": 7, "num_kv_heads": 1, "head_dim": 10},
    "head-layer-norms-after-rope": {"qk_norm": "head", "qk_norm_kind": "layer", "qk_norm_after_rope": True},
    "head-norms-without-gain": {"qk_norm": "head", "qk_norm_after_rope": True, "parts": {"no_gain"}},
    "biases": {"parts": BIASES},
    "biases-and-no-gate": {"parts": BIASES, "gated": False, "activation": "gelu_tanh"},
    "positions": {"parts": {"positions", "embedding_norm"}, "rope": None, "embedding_multiplier": 5.0},
    "multipliers": {"embedding_multiplier": 6.0, "residual_multiplier": 0.3, "logits_multiplier": 0.25},
    "multiplier-of-normed-outputs": {"residual_multiplier": 0.3, "parts": {"output_norms"}},
    "soft-caps": {"attention_softcap": 2.0, "logit_softcap": 3.0},
    **{name: {"activation": name} for name in ("gelu", "gelu_tanh", "relu", "relu2", "clamped_silu")},
    **{f"{name}-without-gate": {"activation": name, "gated": False} for name in ("silu", "gelu", "relu", "relu2")},
    "part-of-the-head-turns": {"rope": HALF, "head_dim": 24},
    "a-rotation-for-each-layer": {
        "rope": [HALF, None, RopeConfig(500.0, 8, "yarn", (1, 2, 3, 4), 1.2)],
        "num_layers": 3,
    },
    "attention-scale": {"attention_scale": 0.9},
    "alibi": {"alibi_slopes": (0.5, 0.25, 0.125, 0.0625), "rope": None},
    "sinks": {"parts": {"sinks"}},
    "window": {"window": 20},
    "wide-window": {"window": 270},
    "windows-in-turns": {"window": [20, 0, 0], "num_layers": 5},
    "windows-that-keep-all": {"window": [20, 0], "keeps_all": True},
    "narrowest-window": {"window": 1},
    "chunks": {"chunk": 24},
    "wide-chunks": {"chunk": 300},
    "all-of-windows": {"window": [300, 0], "chunk": [0, 130], "attention_softcap": 5.0, "parts": {"sinks"}},
    "alibi-in-windows": {"alibi_slopes": (0.5, 0.1, 0.02, 0.004), "window": 280},
    "temperatures": {"temperature": [Temperature(0.3, 16, 1), None, Temperature(0.1, 8)], "num_layers": 3},
    "sigmoid-router": MIXTURE | {"score": "sigmoid", "parts": {"correction", "router_bias"}, "scale": 2.5},
    "shares-as-they-are": MIXTURE | {"renormalise": False},
    "corrected-softmax": MIXTURE | {"parts": {"correction"}},
    "groups-by-best": MIXTURE | {"num_groups": 3, "num_chosen_groups": 2, "renormalise": False, "scale": 3.0},
    "groups-by-two-best": {"num_experts": 12, "num_experts_per_tok": 3, "num_groups": 4, "num_chosen_groups": 2}
    | {"group_score": "top2", "score": "sigmoid", "parts": {"correction"}},
    "share-on-input": MIXTURE
    | {"num_experts_per_tok": 1, "score": "sigmoid", "renormalise": False}
    | {"share_on_input": True, "shared_size": 40},
    "shared-expert": MIXTURE | {"shared_size": 20},
    "gated-shared-expert": MIXTURE | {"shared_size": 100, "parts": {"shared_gate"}, "residual_multiplier": 0.5},
    "expert-biases": MIXTURE | {"parts": {"expert_bias", "router_bias"}, "activation": "clamped_silu"},
    "experts-without-gate": MIXTURE | {"gated": False, "activation": "relu2", "parts": {"output_norms"}},
    "odd-sizes": {"hidden_size": 77, "num_heads": 7, "num_kv_heads": 1, "head_dim": 72, "vocab_size": 1003}
    | {"tie_word_embeddings": False},
}
NUMBERS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"quantization": "int8", "kv_cache_dtype": "float16"},
    "int8-cache": {"kv_cache_dtype": "int8"},
}
TEXTS = sequences(1, 330, 9, 70, 1)

each_field = pytest.mark.parametrize("name", FIELDS)
# All fields with float32, and those whose rounding takes a way of its own with the others.
SOME = {
    "float32": FIELDS,
    "int8": ("parallel-mixture", "biases", "windows-in-turns", "share-on-input", "gated-shared-expert"),
    "int8-cache": ("alibi", "soft-caps", "windows-in-turns", "all-of-windows"),
}
each_numbers = pytest.mark.parametrize(
    ("name", "numbers"),
    [
        (name, numbers) if name in SOME[numbers] else pytest.param(name, numbers, marks=pytest.mark.long)
        for name, numbers in product(FIELDS, NUMBERS)
    ],
)


def record_of(name: str) -> ModelRecord:
    return random_record(**{"max_position_embeddings": 400} | FIELDS[name])


def pages_for(paged: Any, record: ModelRecord) -> Any:
    return paged(**POOL, num_groups=len(record.config.cache_groups))


def logits_in_chunks(record: ModelRecord, paged: Any, **how: Any) -> dict[str, np.ndarray]:
    backend = NativeBackend(record, **{**POOL, "num_threads": 2, **how})
    return run_chunks(backend, pages_for(paged, record), TEXTS, random_steps(2, TEXTS))


@each_field
def test_logits_equal_those_of_the_torch_backend(name: str, paged: Any) -> None:
    record = record_of(name)
    torch_backend, pages = TorchBackend(record, **POOL), pages_for(paged, record)
    for sequence, logits in logits_in_chunks(record, paged).items():
        expected = run_whole(torch_backend, pages, TEXTS[sequence])
        np.testing.assert_allclose(logits, expected, atol=1e-4 * max(1, np.abs(expected).max() / 8), rtol=0)


@each_numbers
def test_bits_depend_on_nothing_but_the_sequence(name: str, numbers: str, paged: Any) -> None:
    """Chunks, company, threads and instruction sets."""
    record = record_of(name)
    backend, pages = NativeBackend(record, **POOL, **NUMBERS[numbers], num_threads=1), pages_for(paged, record)
    expected = {sequence: run_whole(backend, pages, text) for sequence, text in TEXTS.items()}
    for isa in supported_isas():
        found = logits_in_chunks(record, paged, isa=isa, num_threads=3, **NUMBERS[numbers])
        for sequence, logits in expected.items():
            np.testing.assert_array_equal(found[sequence], logits)


@pytest.mark.parametrize(
    "name", ["window", "wide-window", "chunks", "wide-chunks", "windows-in-turns", "all-of-windows"]
)
def test_blocks_that_no_query_sees_are_not_read(name: str, paged: Any) -> None:
    """They may stand as -1 in the table, but those that a query sees may not."""
    record = record_of(name)
    groups = record.config.cache_groups
    backend, pages = NativeBackend(record, **POOL, num_threads=2), pages_for(paged, record)
    (long, *_) = TEXTS.values()
    expected = run_whole(backend, pages, long)
    run_chunks(backend, pages, {"long": long[:310]}, [{"long": 310}])
    for start in range(310, 330, 2):
        batch = pages.batch([("long", long[start : start + 2], start)])
        for index, group in enumerate(groups):
            first = max(
                start - group.window + 1 if group.window else 0,
                start // group.chunk * group.chunk if group.chunk else 0,
            )
            batch.block_tables[0, index :: len(groups)][: first // 16] = -1
            too_few = batch.block_tables.copy()
            too_few[0, index :: len(groups)][first // 16] = -1
            with pytest.raises(AssertionError, match="block_tables"):
                backend.forward(replace(batch, block_tables=too_few))
        np.testing.assert_array_equal(backend.forward(batch), expected[start : start + 2])
