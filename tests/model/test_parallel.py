"""A model on several ranks has the bits that it has on one; here ranks are threads, each with a backend of its own."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import pytest

from shoal.model.architecture import LatentConfig
from shoal.model.backends.split import Split
from shoal.model.backends.torch_backend import TorchBackend
from shoal.scheduler.errors import ConfigError
from tests.model.oracles import random_config, random_record, random_steps, run_chunks, sequences
from tests.model.ranks import BLOCK_SIZE, NUM_BLOCKS, on_ranks

TENSOR_2, TENSOR_4 = Split(tensor=2), Split(tensor=4)
EXPERT_2, BOTH_2 = Split(expert=2), Split(tensor=2, expert=2)
PIPELINE_2, ALL = Split(pipeline=2), Split(tensor=2, pipeline=2)

LATENT = LatentConfig(rank=16, rope_dim=8, nope_dim=8, value_dim=12, query_rank=24)
MIXTURE = {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 20}
# A model, the parts that no field of its configuration names, and how it is split.
CASES: dict[str, tuple[dict[str, Any], Sequence[str], Split]] = {
    "two": ({}, (), TENSOR_2),
    "untied": ({"tie_word_embeddings": False, "vocab_size": 97}, ("head_bias", "output_bias", "qkv_bias"), TENSOR_2),
    "four, two kv heads": ({"num_heads": 8, "head_dim": 10}, ("feed_forward_bias", "output_norms"), TENSOR_4),
    "no gate": (
        {"gated": False, "norm": "layer", "num_kv_heads": 4},
        ("norm_bias", "positions", "feed_forward_bias"),
        TENSOR_4,
    ),
    "parallel": ({"parallel": True, "logit_softcap": 5.0, "attention_softcap": 5.0}, ("shared_norm",), TENSOR_2),
    "norms of heads": ({"qk_norm": "head", "qk_norm_eps": 1e-5}, ("sinks",), TENSOR_2),
    "norms over heads": ({"qk_norm": "whole", "qk_norm_eps": 1e-5}, (), TENSOR_2),
    "alibi": ({"alibi_slopes": (0.5, 0.25, 0.1, 0.05), "rope": None}, ("embedding_norm",), TENSOR_2),
    "windows": ({"window": [0, 9], "num_layers": 3}, (), TENSOR_2),
    "latent": ({"latent": LATENT, "num_kv_heads": 4}, ("qkv_bias",), TENSOR_2),
    "columns of experts": ({**MIXTURE, "num_experts": 5}, ("expert_bias",), TENSOR_2),
    "columns of shared experts": ({**MIXTURE, "shared_size": 24}, ("shared_gate",), TENSOR_2),
    "experts": (MIXTURE, (), EXPERT_2),
    "experts of three": ({**MIXTURE, "shared_size": 24, "share_on_input": True}, ("shared_gate",), Split(expert=3)),
    "experts of four": ({**MIXTURE, "score": "sigmoid"}, ("correction",), Split(expert=4)),
    "experts and heads": ({**MIXTURE, "shared_size": 24}, ("expert_bias",), BOTH_2),
    "stages": ({"num_layers": 3}, ("embedding_norm", "positions"), PIPELINE_2),
    "stages of windows": ({"num_layers": 6, "window": [0, 9, 9]}, (), Split(pipeline=3)),
    "stages of ranks": ({"num_layers": 3, "tie_word_embeddings": False}, (), ALL),
    "stages of experts": ({**MIXTURE, "num_layers": 2}, (), Split(tensor=2, expert=2, pipeline=2)),
}


def cases(dtype: str) -> list[Any]:
    return [pytest.param(*case, dtype, id=f"{name}, {dtype}") for name, case in CASES.items()]


@pytest.mark.parametrize(("fields", "parts", "split", "dtype"), [*cases("float32"), *cases("bfloat16")[::4]])
def test_same_bits(fields: dict[str, Any], parts: Sequence[str], split: Split, dtype: Any, paged: Any) -> None:
    """Of all logits, and of the hidden states that embeddings are made of, and of the first layer alone."""
    record = random_record(parts=parts, **fields)
    texts = sequences(3, 12, 9, 30, 1)
    steps = random_steps(0, texts)
    num_groups = len(record.config.cache_groups)
    alone = TorchBackend(record, dtype=dtype, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    with on_ranks(record, split, dtype) as backends:
        backend = backends[0]
        expected, found = (
            run_chunks(one, paged(NUM_BLOCKS, BLOCK_SIZE, num_groups), texts, steps) for one in (alone, backend)
        )
        batch = paged(NUM_BLOCKS, BLOCK_SIZE, num_groups).batch([("a", texts["sequence-0"], 0)])
        own_batches = [copy(batch), copy(batch)]
        for one, own in zip((alone, backend), own_batches, strict=True):
            own.hidden = np.zeros((len(own.token_ids), record.config.hidden_size), np.float32)
            one.forward(own)
        first = [one.forward(copy(batch), 1) for one in (alone, backend)]
    for name, logits in expected.items():
        np.testing.assert_array_equal(found[name], logits)
    assert own_batches[0].hidden is not None
    assert own_batches[0].hidden.any()
    np.testing.assert_array_equal(own_batches[1].hidden, own_batches[0].hidden)
    np.testing.assert_array_equal(first[1], first[0])


@pytest.mark.parametrize(
    ("fields", "split", "words", "param"),
    [
        ({}, Split(tensor=3), "tensor_parallel 3: it does not divide the model's num_heads 4", "tensor_parallel"),
        ({"hidden_size": 34}, Split(tensor=4), "does not divide the model's hidden_size 34", "tensor_parallel"),
        ({"intermediate_size": 50}, Split(tensor=4), "the model's intermediate_size 50", "tensor_parallel"),
        ({"num_heads": 6, "num_kv_heads": 3}, Split(tensor=2), "3 heads of keys and values", "tensor_parallel"),
        ({"qk_norm": "whole", "num_kv_heads": 1}, Split(tensor=2), "a norm over all keys", "tensor_parallel"),
        ({}, Split(pipeline=3), "pipeline_parallel 3: the model has 2 layers", "pipeline_parallel"),
        ({}, Split(expert=2), "expert_parallel 2: the model has 0 experts in a layer", "expert_parallel"),
        (MIXTURE, Split(expert=7), "expert_parallel 7: the model has 6 experts in a layer", "expert_parallel"),
        (MIXTURE, Split(tensor=4, expert=2), "tensor_parallel 4 and expert_parallel 2: the same", "expert_parallel"),
    ],
)
def test_splits_that_cannot_be(fields: dict[str, Any], split: Split, words: str, param: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        split.check(random_config(**fields))
    assert caught.value.param == param
