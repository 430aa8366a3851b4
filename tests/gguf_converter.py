"""Writes the GGUF file that llama.cpp's converter would make of a checkpoint of any family.

What the converter does was taken from it: metadata, tensor names (which the gguf package maps) and what becomes of the
tensors.  The checkpoint has a vocabulary of empty words, because these tests are not about tokenizers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.gguf_writer import permute, write

Array = NDArray[Any]
Config = Mapping[str, Any]

_ARCHITECTURES = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
# Whose rows of queries and keys the converter brings from halves to pairs.
_PERMUTED = {"llama", "mistral3", "granite", "granitemoe", "smollm3", "arcee", "olmo", "xverse", "internlm2"}
_GAIN_AND_ONE = {"gemma", "gemma2", "gemma3", "nemotron"}
_MERGED = {
    "llama": "layers.{}.feed_forward.experts.{}.weight",
    "minimax-m2": "model.layers.{}.block_sparse_moe.experts.{}.weight",
}
_EXPERT = re.compile(r"model\.layers\.(\d+)\..*experts\.(\d+)\.(\w+)\.weight")


def convert(folder: Path, path: Path, architecture: str, *, matrices: Type = Type.F32, **changes: Any) -> Path:
    """Write the model of the folder as that architecture of llama.cpp.

    Args:
        changes: metadata to change, by keys without the architecture's name; None removes one.
    """
    config = json.loads((folder / "config.json").read_text())
    own = _common(config) | _METADATA.get(architecture, lambda config: {})(config)
    own |= {key.replace("__", "."): value for key, value in changes.items()}
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(config["vocab_size"])],
        **{f"tokenizer.ggml.{key}": config[key] for key in ("bos_token_id", "eos_token_id")},
        **{f"{architecture}.{key}": value for key, value in own.items() if value is not None},
    }
    names = gguf.get_tensor_name_map(_ARCHITECTURES[architecture], own["block_count"])
    arrays = _converted(architecture, config, load_file(folder / "model.safetensors"))
    tensors = {}
    for name, array in (arrays | _extra_tensors(config)).items():
        new = name if name.startswith("rope_") else names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, f"llama.cpp has no name for {name}"
        kind = matrices if array.ndim > 1 and "gate_inp" not in new else Type.F32
        tensors[new] = gguf.quantize(np.ascontiguousarray(array, np.float32), kind), kind
    return write(path, metadata, tensors)


def _find(config: Config, *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _head_dim(config: Config) -> int:
    hidden, heads = _find(config, "hidden_size", "n_embd", "d_model"), _heads(config)
    return int(config.get("head_dim") or hidden // heads)


def _heads(config: Config) -> int:
    return int(_find(config, "num_attention_heads", "n_head", "n_heads"))


def _common(config: Config) -> dict[str, Any]:
    """What the converter writes of every model."""
    scores = {"sigmoid": 2, "softmax": 1, None: None}
    metadata = {
        "block_count": _find(config, "num_hidden_layers", "n_layer", "n_layers"),
        "context_length": _find(config, "max_position_embeddings", "n_positions", "max_seq_len"),
        "embedding_length": _find(config, "hidden_size", "n_embd", "d_model"),
        "feed_forward_length": _find(config, "intermediate_size", "n_inner"),
        "attention.head_count": _heads(config),
        "attention.head_count_kv": config.get("num_key_value_heads"),
        "attention.layer_norm_rms_epsilon": _find(config, "rms_norm_eps", "norm_eps"),
        "attention.layer_norm_epsilon": _find(config, "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        "attention.key_length": config.get("head_dim"),
        "attention.value_length": config.get("head_dim"),
        "expert_count": _find(config, "num_local_experts", "num_experts"),
        "expert_used_count": config.get("num_experts_per_tok"),
        "expert_group_count": config.get("n_group"),
        "expert_group_used_count": config.get("topk_group"),
        "expert_gating_func": scores[config.get("scoring_func")],
    }
    parameters: dict[str, Any] = config.get("rope_parameters") or {}
    rope: dict[str, Any] = parameters.get("full_attention", parameters)
    metadata |= {
        "rope.freq_base": rope.get("rope_theta"),
        "rope.freq_base_swa": parameters.get("sliding_attention", {}).get("rope_theta"),
    }
    if rope.get("rope_type") in ("linear", "yarn"):
        metadata |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope.get("rope_type") == "yarn":
        metadata |= {
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_attn_factor": rope.get("attention_factor"),
            "rope.scaling.yarn_beta_fast": rope.get("beta_fast"),
            "rope.scaling.yarn_beta_slow": rope.get("beta_slow"),
        }
    return metadata


def _turning(default: float = 1.0) -> Callable[[Config], dict[str, Any]]:
    """The number of a head's elements that turn."""
    return lambda config: {
        "rope.dimension_count": int(
            _head_dim(config) * (config.get("rope_parameters") or {}).get("partial_rotary_factor", default)
        )
    }


def _window(config: Config) -> dict[str, Any]:
    return {"attention.sliding_window": config.get("sliding_window") or 0}


def _pattern(config: Config) -> dict[str, Any]:
    if config.get("sliding_window") is None:
        return {}
    windows = [kind == "sliding_attention" for kind in config["layer_types"]]
    return _window(config) | {"attention.sliding_window_pattern": windows}


def _granite(config: Config) -> dict[str, Any]:
    return _turning()(config) | {
        "vocab_size": config["vocab_size"],
        "attention.scale": config["attention_multiplier"],
        "embedding_scale": config["embedding_multiplier"],
        "residual_scale": config["residual_multiplier"],
        "logit_scale": config["logits_scaling"],
        "expert_shared_feed_forward_length": config.get("shared_intermediate_size"),
    }


def _routed(config: Config) -> dict[str, Any]:
    return {
        "expert_count": config["n_routed_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"] or None,
    }


def _deepseek(config: Config) -> dict[str, Any]:
    rank, rope_dim = config["kv_lora_rank"], config["qk_rope_head_dim"]
    all_dims = config["rope_parameters"].get("mscale_all_dim")
    return _routed(config) | {
        "vocab_size": config["vocab_size"],
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config["q_lora_rank"],
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rope_dim,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rope_dim,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": rope_dim,
        "rope.scaling.yarn_log_multiplier": None if all_dims is None else 0.1 * all_dims,
        "expert_gating_func": 2 if config["model_type"] == "deepseek_v3" else None,
    }


def _llama4(config: Config) -> dict[str, Any]:
    return _turning()(config) | {
        "vocab_size": config["vocab_size"],
        "feed_forward_length": config["intermediate_size_mlp"],
        "expert_feed_forward_length": config["intermediate_size"],
        "interleave_moe_layer_step": config["interleave_moe_layer_step"],
    }


def _mistral3(config: Config) -> dict[str, Any]:
    rope = config["rope_parameters"]
    return _turning()(config) | {
        "rope.scaling.yarn_log_multiplier": rope.get("mscale_all_dim"),
        "attention.temperature_scale": rope.get("llama_4_scaling_beta"),
    }


def _phi3(config: Config) -> dict[str, Any]:
    scale = config["max_position_embeddings"] / config["original_max_position_embeddings"]
    factor = math.sqrt(1 + math.log(scale) / math.log(config["original_max_position_embeddings"])) if scale > 1 else 1.0
    is_long = config["rope_parameters"]["rope_type"] == "longrope"
    return _turning()(config) | {
        "attention.sliding_window": config["sliding_window"] or 0,
        "rope.scaling.original_context_length": config["original_max_position_embeddings"],
        "rope.scaling.attn_factor": factor if is_long else None,
    }


def _phi2(config: Config) -> dict[str, Any]:
    return _turning()(config) | {"rope.freq_base": None, "attention.head_count_kv": _heads(config)}


def _falcon(config: Config) -> dict[str, Any]:
    heads = config["num_kv_heads"] if config["new_decoder_architecture"] else 1
    return {"tensor_data_layout": "jploski", "feed_forward_length": 4 * config["hidden_size"]} | {
        "attention.head_count_kv": heads
    }


def _mpt(config: Config) -> dict[str, Any]:
    return {
        "feed_forward_length": 4 * config["d_model"],
        "attention.layer_norm_epsilon": 1e-5,
        "attention.max_alibi_bias": float(config["attn_config"]["alibi_bias_max"]),
    }


def _four_widths(config: Config) -> dict[str, Any]:
    return {"feed_forward_length": 4 * _find(config, "hidden_size", "n_embd")}


def _stablelm(config: Config) -> dict[str, Any]:
    return _turning()(config) | {"use_parallel_residual": config["use_parallel_residual"]}


def _cohere2(config: Config) -> dict[str, Any]:
    return _window(config) | {
        "vocab_size": config["vocab_size"],
        "logit_scale": config["logit_scale"],
        "rope.dimension_count": _head_dim(config),
        "rope.scaling.type": "none",
    }


def _ernie_moe(config: Config) -> dict[str, Any]:
    return {
        "expert_count": config["moe_num_experts"],
        "expert_used_count": config["moe_k"],
        "interleave_moe_layer_step": config["moe_layer_interval"],
        "leading_dense_block_count": config["moe_layer_start_index"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["moe_num_shared_experts"],
        "expert_shared_feed_forward_length": config["moe_intermediate_size"] * config["moe_num_shared_experts"],
    }


def _vocabulary_and_turning(config: Config) -> dict[str, Any]:
    return _turning()(config) | {"vocab_size": config["vocab_size"]}


_METADATA: dict[str, Callable[[Config], dict[str, Any]]] = {
    "llama": _vocabulary_and_turning,
    "smollm3": _vocabulary_and_turning,
    "arcee": _vocabulary_and_turning,
    "exaone": _turning(),
    "xverse": _turning(),
    "internlm2": _turning(),
    "mistral3": _mistral3,
    "llama4": _llama4,
    "qwen2moe": lambda config: {
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
    },
    "qwen3moe": lambda config: {"expert_feed_forward_length": config["moe_intermediate_size"]},
    "gemma2": lambda config: (
        _window(config) | {name: config[name] for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    ),
    "gemma3": _window,
    "phi2": _phi2,
    "phi3": _phi3,
    "gpt2": _four_widths,
    "gptj": lambda config: _four_widths(config) | {"rope.dimension_count": config["rotary_dim"]},
    "starcoder": lambda config: _four_widths(config) | {"attention.head_count_kv": 1},
    "bloom": lambda config: _four_widths(config) | {"context_length": 2048},
    "gptneox": lambda config: _turning()(config) | {"use_parallel_residual": config["use_parallel_residual"]},
    "falcon": _falcon,
    "mpt": _mpt,
    "stablelm": _stablelm,
    "olmo": lambda config: {"attention.layer_norm_epsilon": 1e-5},
    "olmo2": _pattern,
    "olmoe": lambda config: {"attention.layer_norm_rms_epsilon": 1e-5},
    "granite": _granite,
    "granitemoe": _granite,
    "deepseek2": _deepseek,
    "command-r": lambda config: {"logit_scale": config["logit_scale"], "rope.scaling.type": "none"},
    "cohere2": _cohere2,
    "chatglm": _turning(),
    "glm4": _turning(),
    "glm4moe": lambda config: (
        _turning()(config)
        | _routed(config)
        | {"expert_gating_func": 2, "expert_weights_norm": config["norm_topk_prob"], "nextn_predict_layers": 0}
    ),
    "dots1": lambda config: _routed(config) | {"expert_gating_func": 2},
    "gpt-oss": lambda config: _window(config) | {"expert_feed_forward_length": config["intermediate_size"]},
    "exaone4": lambda config: _pattern(config) | {"vocab_size": config["vocab_size"]},
    "ernie4_5-moe": _ernie_moe,
    "nemotron": lambda config: _vocabulary_and_turning(config) | {"rope.scaling.type": "none"},
    "minimax-m2": lambda config: (
        _turning()(config) | {"expert_feed_forward_length": config["intermediate_size"], "expert_gating_func": 2}
    ),
}


def _extra_tensors(config: Config) -> dict[str, Array]:
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") != "longrope":
        return {}
    return {f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32) for kind in ("long", "short")}


def _converted(architecture: str, config: Config, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors as the converter stores them, by Hugging Face names that the package maps."""
    converted: dict[str, Array] = {}
    experts: dict[str, list[Array]] = {}
    norms: dict[str, list[Array]] = {}
    for name in sorted(
        tensors, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    ):
        array = tensors[name]
        if expert := _EXPERT.fullmatch(name):
            merged = _MERGED.get(architecture, "model.layers.{}.mlp.experts.{}.weight").format(expert[1], expert[3])
            experts.setdefault(merged, []).append(array)
        elif "_layernorm.norms." in name:
            norms.setdefault(re.sub(r"\.norms\.\d+", "", name), []).append(array)
        else:
            converted |= _one(architecture, config, name, array)
    return converted | {name: np.stack(arrays) for name, arrays in (experts | norms).items()}


def _one(architecture: str, config: Config, name: str, array: Array) -> dict[str, Array]:
    """What becomes of one tensor."""
    if architecture == "bloom":
        name = name.removeprefix("transformer.")
    if architecture in _GAIN_AND_ONE and name.endswith("norm.weight"):
        return {name: array + np.float32(1)}
    if architecture == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return {name: array.T}
    if "e_score_correction_bias" in name:
        return {name.replace("e_score_correction_bias", "e_score_correction.bias"): array.reshape(-1)}
    if "input_linear" in name:
        return _granites_halves(name, array)
    if ".experts." in name:
        return _stacked(architecture, name, array)
    return _of_attention(architecture, config, name, array)


def _of_attention(architecture: str, config: Config, name: str, array: Array) -> dict[str, Array]:
    heads, kv_heads = _heads(config), config.get("num_key_value_heads") or _heads(config)
    if architecture in _PERMUTED and (part := re.search(r"\.(q|k)_proj\.(weight|bias)$", name)):
        return {name: permute(array, heads if part[1] == "q" else kv_heads)}
    if "query_key_value" in name:
        groups = _falcon(config)["attention.head_count_kv"] if architecture == "falcon" else heads
        parts = array.reshape(groups, heads // groups + 2, -1, *array.shape[1:])
        cut = (parts[:, :-2], parts[:, [-2]], parts[:, [-1]])
        return {name: np.concatenate([part.reshape(-1, *array.shape[1:]) for part in cut])}
    if "kv_b_proj" in name:
        parts = array.reshape(heads, -1, array.shape[-1])
        key, value = np.split(parts, [config["qk_nope_head_dim"]], axis=1)
        keys = key.swapaxes(1, 2)
        return {name.replace("kv_b_proj", "k_b_proj"): keys, name.replace("kv_b_proj", "v_b_proj"): value}
    return {f"{name}.weight" if name.endswith("sinks") else name: array}


def _granites_halves(name: str, array: Array) -> dict[str, Array]:
    """Gate and up of what Granite has in one tensor, of the experts or of the shared one."""
    tensors = (gguf.MODEL_TENSOR.FFN_GATE_EXP, gguf.MODEL_TENSOR.FFN_UP_EXP)
    if "shared_mlp" in name:
        tensors = (gguf.MODEL_TENSOR.FFN_GATE_SHEXP, gguf.MODEL_TENSOR.FFN_UP_SHEXP)
    names = [f"{gguf.TENSOR_NAMES[tensor].format(bid=name.split('.')[2])}.weight" for tensor in tensors]
    return dict(zip(names, np.split(array, 2, axis=-2), strict=True))


def _stacked(architecture: str, name: str, array: Array) -> dict[str, Array]:
    """Llama 4's and GPT-OSS's experts, which are [experts, in, out] and have gate and up in one tensor."""
    is_bias = name.endswith("_bias")
    stem, suffix = name.removesuffix("_bias"), ".bias" if is_bias else ".weight"
    turned = array if is_bias else array.swapaxes(1, 2)
    if "gate_up_proj" not in name:
        return {stem + suffix: turned}
    gate, up = np.split(turned, 2, axis=1) if architecture == "llama4" else (turned[:, ::2], turned[:, 1::2])
    return {stem.replace("gate_up", "gate") + suffix: gate, stem.replace("gate_up", "up") + suffix: up}
