from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shoal.model.architecture import RopeConfig, bytes_per_block
from shoal.model.checkpoint.config import UNSTATED_SAMPLING, GenerationDefaults, load_config, load_generation_defaults
from shoal.scheduler.errors import CheckpointError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
MIXTRAL: dict[str, Any] = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def write(folder: Path, values: dict[str, Any], name: str = "config.json") -> Path:
    (folder / name).write_text(json.dumps(values))
    return folder


def test_reads_both_families(tmp_path: Path) -> None:
    llama = load_config(write(tmp_path, LLAMA))
    assert (llama.family, llama.num_layers, llama.num_heads, llama.num_kv_heads, llama.head_dim) == (
        "llama",
        3,
        8,
        2,
        8,
    )
    assert (llama.layers[0].mixture, llama.layers[0].intermediate_size, llama.tie_word_embeddings) == (None, 96, False)
    assert (llama.bos_token_id, llama.eos_token_ids, llama.dtype) == (1, (2, 3), "float32")
    assert llama.layers[0].rope == RopeConfig(10_000.0, 8)
    mixtral = load_config(write(tmp_path, {**MIXTRAL, "head_dim": 32, "eos_token_id": 7}))
    layer = mixtral.layers[2]
    assert layer.mixture and (layer.mixture.num_experts, layer.mixture.num_experts_per_tok) == (8, 2)
    assert (layer.mixture.intermediate_size, mixtral.head_dim, mixtral.eos_token_ids) == (96, 32, (7,))
    assert layer.rope == RopeConfig(1_000_000.0, 32)


LINEAR_FACTORS = (4.0,) * 4


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(5e5, 8)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}, (5e5, 8, "linear", LINEAR_FACTORS)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}, (3e4, 8)),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 3e4, "factor": 4}},
            (3e4, 8, "linear", LINEAR_FACTORS),
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, (1e4, 8, "dynamic")),
        ({"partial_rotary_factor": 0.5}, (1e4, 4)),
    ],
)
def test_reads_rope_as_transformers_4_and_5_write_it(fields: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    rope = load_config(write(tmp_path, {**LLAMA, **fields})).layers[0].rope
    assert rope == (expected if isinstance(expected, RopeConfig) else RopeConfig(*expected))


SCALINGS: dict[str, dict[str, Any]] = {
    "llama3": LLAMA3,
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 256},
    "yarn-truncate": {"factor": 8.0, "original_max_position_embeddings": 256, "truncate": False, "beta_fast": 4.0},
    "yarn-mscale": {"factor": 40.0, "original_max_position_embeddings": 64, "mscale": 0.9, "mscale_all_dim": 0.7},
    "yarn-attention": {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.25},
    "longrope": {"original_max_position_embeddings": 256, "short_factor": [1.0] * 16, "long_factor": [1.5, 2.0] * 8},
    "longrope-short": {"original_max_position_embeddings": 2048, "factor": 4.0}
    | {"short_factor": [1.0, 1.25] * 8, "long_factor": [9.0] * 16},
}


@pytest.mark.parametrize("max_model_len", [128, 257, 2048])
@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scalings_equal_transformers(name: str, max_model_len: int, tmp_path: Path) -> None:
    scaling = {"rope_type": name.partition("-")[0], "rope_theta": 5e5, **SCALINGS[name]}
    read = load_config(write(tmp_path, {**LLAMA, "head_dim": 32, "rope_parameters": scaling}))
    rope = read.within(max_model_len).layers[0].rope
    assert rope
    config = LlamaConfig(head_dim=32, max_position_embeddings=2048, rope_parameters=scaling)
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, seq_len=max_model_len)
    found = 5e5 ** -(np.arange(0, 32, 2) / 32) / np.array(rope.factors)
    np.testing.assert_allclose(found, frequencies.numpy(), rtol=1e-6)
    assert rope.attention_factor == pytest.approx(attention_factor)


def test_each_kind_of_attention_has_its_rope_in_both_spellings(tmp_path: Path) -> None:
    gemma = {**LLAMA, "model_type": "gemma3_text", "sliding_window": 128, "head_dim": 8}
    new = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    new |= {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}
    old = {"rope_local_base_freq": 1e4, "rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    ropes = [RopeConfig(1e4, 8), RopeConfig(1e6, 8, "linear", (8.0,) * 4), RopeConfig(1e4, 8)]
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    for spelling in ({"rope_parameters": new, "layer_types": kinds}, {**old, "sliding_window_pattern": 2}):
        config = load_config(write(tmp_path, {**gemma, **spelling}))
        assert [layer.rope for layer in config.layers] == ropes
        assert [layer.window for layer in config.layers] == [128, 0, 128]


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_reads_the_dtype_under_both_names(name: str, tmp_path: Path) -> None:
    assert load_config(write(tmp_path, {**LLAMA, name: "bfloat16"})).dtype == "bfloat16"


def test_reads_what_transformers_saves(tiny_checkpoint: Callable[..., Path]) -> None:
    config = load_config(tiny_checkpoint("mixtral", num_local_experts=6, num_experts_per_tok=3, head_dim=16))
    mixture = config.layers[0].mixture
    assert mixture and (config.architecture, mixture.num_experts, config.head_dim) == ("MixtralForCausalLM", 6, 16)
    assert config.layers[0].rope == RopeConfig(1_000_000.0, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "clip"}, "model_type: 'clip' is not supported"),
        ({"model_type": None}, "model_type: expected the name"),
        ({"architectures": []}, "architectures: expected a list"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures: expected a list of one name"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"hidden_size": "64"}, "hidden_size: expected an integer of at least 1, found '64'"),
        ({"hidden_size": True}, "hidden_size: expected an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected an integer of at least 1"),
        ({"vocab_size": 4.5}, "vocab_size: expected an integer"),
        ({"rms_norm_eps": None}, "rms_norm_eps: missing"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps: expected a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
        ({"num_key_value_heads": 3}, "num_attention_heads: 8 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 60}, "hidden_size: 60 is not a multiple of num_attention_heads 8"),
        ({"head_dim": 7}, "head_dim: 7 of 7 elements of a head turn; expected an even number"),
        ({"partial_rotary_factor": 0.1}, "head_dim: 0 of 8 elements"),
        ({"partial_rotary_factor": 2.0}, "head_dim: 16 of 8 elements"),
        ({"head_dim": 10**30}, r"head_dim: \d+ of 10+ elements"),
        ({"hidden_act": ["silu"]}, r"hidden_act: \['silu'\] is not supported"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 exceeds 10000"),
        ({"attention_bias": 1}, "attention_bias: expected true or false"),
        ({"sliding_window": 1024}, "sliding_window: unknown for the family llama"),
        ({"layer_types": 3}, "layer_types: only full_attention"),
        ({**MIXTRAL, "sliding_window": 0}, "sliding_window: expected an integer of at least 1"),
        ({"dtype": "float8_e4m3fn"}, "dtype: 'float8_e4m3fn' is not supported"),
        ({"eos_token_id": "</s>"}, "eos_token_id: expected a token id"),
        ({"rope_scaling": {"type": "ntk", "factor": 2}}, r"rope_scaling\.rope_type: 'ntk' is not supported"),
        ({"rope_scaling": {"type": "default", "rope_type": 3}}, r"rope_scaling\.rope_type: 3 is not supported"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected an object"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor: missing"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, r"rope_scaling\.beta: unknown"),
        (
            {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 9}},
            r"rope_parameters\.low_freq_factor: 9",
        ),
        ({**MIXTRAL, "num_local_experts": None}, "num_local_experts: missing"),
        ({**MIXTRAL, "num_experts_per_tok": 9}, "num_experts_per_tok: 9 exceeds num_local_experts 8"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses_by_file_and_field(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        load_config(write(tmp_path, {**LLAMA, **change}))


def test_a_window_counts_where_it_takes_effect(tmp_path: Path) -> None:
    for window, expected in ((4096, 0), (2048, 0), (1024, 1024), (None, 0)):
        layers = load_config(write(tmp_path, {**MIXTRAL, "sliding_window": window})).layers
        assert [layer.window for layer in layers] == [expected] * 3


def test_tokens_outside_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, {**LLAMA, "bos_token_id": 100, "eos_token_id": [2, 100, 99]}))
    assert (config.bos_token_id, config.eos_token_ids) == (None, (2, 99))


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "expected a JSON object")])
def test_refuses_a_malformed_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path)


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        load_config(tmp_path)


def test_generation_defaults(tmp_path: Path) -> None:
    assert load_generation_defaults(tmp_path) == UNSTATED_SAMPLING
    name = "generation_config.json"
    write(tmp_path, {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "eos_token_id": [1, 2], "do_sample": True}, name)
    assert load_generation_defaults(tmp_path) == GenerationDefaults(
        temperature=0.6, top_p=0.9, top_k=50, eos_token_ids=(1, 2)
    )
    write(tmp_path, {"temperature": 0.6, "do_sample": False}, name)
    assert load_generation_defaults(tmp_path).temperature == 0.0
    write(tmp_path, {"bos_token_id": 1, "eos_token_id": 2}, name)
    assert load_generation_defaults(tmp_path) == GenerationDefaults(0.8, 40, 0.95, 0.05, eos_token_ids=(2,))
    write(tmp_path, {"repetition_penalty": 1.1}, name)
    assert load_generation_defaults(tmp_path) == GenerationDefaults(repetition_penalty=1.1)
    write(tmp_path, {"top_p": "high"}, name)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p"):
        load_generation_defaults(tmp_path)


def test_bytes_per_block(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, LLAMA))
    assert bytes_per_block(config, "float32", 16) == 3 * 2 * 2 * 8 * 16 * 4
    assert bytes_per_block(config, "bfloat16", 16) == 3 * 2 * 2 * 8 * 16 * 2
    assert bytes_per_block(config, "int8", 16) == 3 * 2 * 2 * (8 + 4) * 16
