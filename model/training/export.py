"""From a trained network to a folder that transformers and Shoal load: bfloat16 safetensors under HF names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .network import Experts, FeedForward, Layer, Network
from .prediction import PredictionNetwork
from .recipe import NetworkConfig
from .tokenizer import END_OF_TEXT, END_OF_TURN, load_tokenizer, special_id, write_tokenizer_config


def export(network: Network, tokenizer: Path, folder: Path) -> None:
    """Write config.json, model.safetensors, and the files of the tokenizer and of generation, into `folder`.

    A module of multi-token prediction has the target's tokenizer, in the folder above.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in named_weights(network)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = load_tokenizer(tokenizer)
    end_of_text, end_of_turn = special_id(tokens, END_OF_TEXT), special_id(tokens, END_OF_TURN)
    _write_json(folder / "config.json", hf_config(network.config, end_of_text))
    if isinstance(network, PredictionNetwork):
        return
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": end_of_text,
            "eos_token_id": [end_of_text, end_of_turn],
            "pad_token_id": end_of_text,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.9,
        },
    )
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    write_tokenizer_config(folder, network.config.max_position_embeddings)


def hf_config(config: NetworkConfig, end_of_text: int) -> dict[str, Any]:
    """The config.json of a MixtralForCausalLM, or of a LlamaForCausalLM if there are no experts."""
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "torch_dtype": "bfloat16",
    }
    if not config.num_experts:
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **common, "attention_bias": False}
    experts = {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "sliding_window": None,
    }
    return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **common, **experts}


def named_weights(network: Network) -> Iterator[tuple[str, Tensor]]:
    """The network's weights under the names that checkpoints of its family use."""
    if isinstance(network, PredictionNetwork):
        yield from ((f"model.layers.0.{name}", weight) for name, weight in network.own_weights())
    else:
        yield "model.embed_tokens.weight", network.embedding.weight
        yield "model.norm.weight", network.norm.weight
        if not network.config.tie_word_embeddings:
            yield "lm_head.weight", network.lm_head.weight
    for i, layer in enumerate(network.layers):
        assert isinstance(layer, Layer)
        for name, weight in _layer_weights(layer):
            yield f"model.layers.{i}.{name}", weight


def _layer_weights(layer: Layer) -> Iterator[tuple[str, Tensor]]:
    yield "input_layernorm.weight", layer.input_norm.weight
    yield "post_attention_layernorm.weight", layer.post_attention_norm.weight
    attention = layer.attention
    heads = attention.num_heads, attention.num_kv_heads, attention.num_kv_heads
    parts = torch.split(attention.qkv_proj.weight, [count * attention.head_dim for count in heads])
    for name, weight in zip("qkv", parts, strict=True):
        yield f"self_attn.{name}_proj.weight", weight
    yield "self_attn.o_proj.weight", attention.o_proj.weight
    if isinstance(layer.mlp, FeedForward):
        for name, weight in layer.mlp.named_parameters():
            yield f"mlp.{name}", weight
    else:
        yield from _expert_weights(layer.mlp)


def _expert_weights(experts: Experts) -> Iterator[tuple[str, Tensor]]:
    """Mixtral's w1 is the gate, w3 is up, w2 is down."""
    yield "block_sparse_moe.gate.weight", experts.router.weight
    for e in range(experts.num_experts):
        gate, up = experts.gate_up[e].chunk(2)
        for name, weight in (("w1", gate), ("w2", experts.down[e]), ("w3", up)):
            yield f"block_sparse_moe.experts.{e}.{name}.weight", weight


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
