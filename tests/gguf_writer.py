"""Writes the GGUF file that llama.cpp's converter would make of a small Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import TokenType
from numpy.typing import NDArray
from safetensors.numpy import load_file
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Array = NDArray[Any]

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERTS = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}


def write_gguf(
    path: Path,
    folder: Path,
    *,
    matrices: Type = Type.F32,
    stacked: bool = True,
    edit: Callable[[dict[str, Any]], object] | None = None,
    edit_tensors: Callable[[dict[str, Array]], object] | None = None,
) -> Path:
    """Write the model of the folder, with its tokenizer where it has one.

    Args:
        matrices: the type of all tensors of more than one dimension, but for the router.
        stacked: experts in one tensor, as today, or one by one, as once.
        edit: changes the metadata before it is written; integers are uint32, lists what their elements are.
        edit_tensors: changes the tensors before they are quantised.
    """
    config = json.loads((folder / "config.json").read_text())
    metadata = model_metadata(config)
    if (folder / "tokenizer.json").exists():
        metadata |= tokenizer_metadata(folder)
    if edit is not None:
        edit(metadata)
    tensors = rename(load_file(folder / "model.safetensors"), config, stacked=stacked)
    metadata |= rope_metadata(config, tensors)
    if edit_tensors is not None:
        edit_tensors(tensors)
    types = {
        name: matrices if array.ndim > 1 and "gate_inp" not in name else Type.F32 for name, array in tensors.items()
    }
    return write(path, metadata, {name: (gguf.quantize(a, types[name]), types[name]) for name, a in tensors.items()})


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[Array, Type]]) -> Path:
    """Write keys and tensors, the latter as bytes of their type."""
    writer = gguf.GGUFWriter(path, metadata.get("general.architecture", ""))
    for key, value in metadata.items():
        if key != "general.architecture":
            add_value(writer, key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            raise TypeError(f"{key}: {value!r}")


def model_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    metadata = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.vocab_size": config["vocab_size"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
    }
    if "num_local_experts" in config:
        metadata["llama.expert_count"] = config["num_local_experts"]
        metadata["llama.expert_used_count"] = config["num_experts_per_tok"]
    return metadata


def rope_metadata(config: Mapping[str, Any], tensors: dict[str, Array]) -> dict[str, Any]:
    """Linear scaling is two keys; Llama 3's is a tensor of what divides each frequency."""
    rope = config["rope_parameters"]
    if rope["rope_type"] == "linear":
        return {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**config), torch.device("cpu"))
        head_dim = 2 * len(scaled)
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)
        tensors["rope_freqs.weight"] = (plain / scaled).numpy().astype(np.float32)
    return {}


def tokenizer_metadata(folder: Path) -> dict[str, Any]:
    """Of a byte-level tokenizer that cuts as GPT-2 did."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": [
            int(TokenType.CONTROL if i in special else TokenType.NORMAL) for _, i in vocabulary
        ],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
    }
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if "chat_template" in config:
        metadata["tokenizer.chat_template"] = config["chat_template"]
    return metadata


def rename(tensors: Mapping[str, Array], config: Mapping[str, Any], *, stacked: bool) -> dict[str, Array]:
    """Tensors by llama.cpp's names; rows of queries and keys that turn together become neighbours."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    renamed: dict[str, Array] = {}
    experts: dict[str, list[Array]] = {}
    for name in sorted(tensors):
        layer, part = split_layer(name.removesuffix(".weight"))
        array = np.asarray(tensors[name], np.float32)
        if ".experts." in part:
            expert, matrix = part.split(".")[-2:]
            experts.setdefault(f"{layer}{EXPERTS[matrix]}", []).append(array)
            if not stacked:
                renamed[f"{layer}{EXPERTS[matrix]}.{expert}.weight"] = array
            continue
        own = NAMES[part]
        renamed[f"{layer}{own}.weight"] = permute(array, heads[own]) if own in heads else array
    if stacked:
        renamed |= {f"{name}_exps.weight": np.stack(arrays) for name, arrays in experts.items()}
    return renamed


def split_layer(name: str) -> tuple[str, str]:
    if not name.startswith("model.layers."):
        return "", name
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.", part


def permute(array: Array, num_heads: int) -> Array:
    halves = array.reshape(num_heads, 2, array.shape[0] // num_heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)
