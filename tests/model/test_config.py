from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.model.checkpoint.config import UNSTATED_SAMPLING, GenerationDefaults, load_config, load_generation_defaults
from shoal.model.record import RopeConfig, bytes_per_block
from shoal.scheduler.errors import CheckpointError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
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
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def write(folder: Path, values: dict[str, Any], name: str = "config.json") -> Path:
    (folder / name).write_text(json.dumps(values))
    return folder


def test_reads_both_families(tmp_path: Path) -> None:
    llama = load_config(write(tmp_path, LLAMA))
    assert (llama.num_layers, llama.num_heads, llama.num_kv_heads, llama.head_dim) == (3, 8, 2, 8)
    assert (llama.num_experts, llama.num_experts_per_tok, llama.tie_word_embeddings) == (0, 0, False)
    assert (llama.bos_token_id, llama.eos_token_ids, llama.dtype) == (1, (2, 3), "float32")
    assert llama.rope == RopeConfig(theta=10_000.0)
    mixtral = load_config(write(tmp_path, {**MIXTRAL, "head_dim": 32, "eos_token_id": 7}))
    assert (mixtral.num_experts, mixtral.num_experts_per_tok, mixtral.head_dim) == (8, 2, 32)
    assert mixtral.eos_token_ids == (7,)
    assert mixtral.rope == RopeConfig(theta=1_000_000.0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, RopeConfig(5e5, "linear", 2.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}, RopeConfig(3e4)),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 3e4, "factor": 4}},
            RopeConfig(3e4, "linear", 4.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
        ),
    ],
)
def test_reads_rope_as_transformers_4_and_5_write_it(
    fields: dict[str, Any], expected: RopeConfig, tmp_path: Path
) -> None:
    assert load_config(write(tmp_path, {**LLAMA, **fields})).rope == expected


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_reads_the_dtype_under_both_names(name: str, tmp_path: Path) -> None:
    assert load_config(write(tmp_path, {**LLAMA, name: "bfloat16"})).dtype == "bfloat16"


def test_reads_what_transformers_saves(tiny_checkpoint: Callable[..., Path]) -> None:
    config = load_config(tiny_checkpoint("mixtral", num_local_experts=6, num_experts_per_tok=3, head_dim=16))
    assert (config.architecture, config.num_experts, config.head_dim) == ("MixtralForCausalLM", 6, 16)
    assert config.rope == RopeConfig(theta=1_000_000.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architectures: 'GemmaForCausalLM' is not supported"),
        ({"architectures": None}, "architectures: expected a list"),
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
        ({"head_dim": 7}, "head_dim: 7 is odd"),
        ({"attention_bias": True}, "attention_bias: true is not supported"),
        ({"mlp_bias": True}, "mlp_bias: true is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ({"sliding_window": 1024}, "sliding_window: 1024"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types: only full_attention"),
        ({"layer_types": 3}, "layer_types: only full_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1"),
        ({"dtype": "float8_e4m3fn"}, "dtype: 'float8_e4m3fn' is not supported"),
        ({"eos_token_id": 100}, "eos_token_id: .* is not within vocab_size 100"),
        ({"eos_token_id": "</s>"}, "eos_token_id: expected a token id"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_scaling: rope type 'yarn' is not supported"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected an object"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor: missing"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, "rope_scaling: beta: unknown"),
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


def test_a_sliding_window_that_never_takes_effect_is_fine(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, {**MIXTRAL, "sliding_window": 4096})).max_position_embeddings == 2048


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
