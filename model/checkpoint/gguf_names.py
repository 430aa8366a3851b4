"""What llama.cpp calls the tensors of all families."""

from __future__ import annotations

import re
from collections.abc import Iterable

from shoal.model.checkpoint.families import Tensors
from shoal.model.checkpoint.gguf_architectures import Architecture

# By the parts of `Tensors`; a tuple where files differ.
_NAMES: dict[str, str | tuple[str, ...]] = {
    "embedding": "token_embd",
    "embedding_norm": "token_embd_norm",
    "positions": "position_embd",
    "norm": "output_norm",
    "head": "output",
    "layer": "blk.{}.",
    "input_norm": "attn_norm",
    "qkv_proj": "attn_qkv",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "sinks": "attn_sinks.weight",
    "q_down": "attn_q_a",
    "q_down_norm": "attn_q_a_norm",
    "q_up": "attn_q_b",
    "kv_down": "attn_kv_a_mqa",
    "kv_norm": "attn_kv_a_norm",
    "kv_up": "attn_kv_b",
    "attention_output_norm": "post_attention_norm",
    "feed_forward_norm": "ffn_norm",
    "feed_forward_output_norm": "post_ffw_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "gate_up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "router": "ffn_gate_inp",
    "correction": ("exp_probs_b.bias", "exp_probs_b.weight"),
    "expert_gate_proj": "ffn_gate.{}",
    "expert_up_proj": "ffn_up.{}",
    "expert_down_proj": "ffn_down.{}",
    "experts_gate": "ffn_gate_exps.weight",
    "experts_up": "ffn_up_exps.weight",
    "experts_down": "ffn_down_exps.weight",
    "experts_gate_bias": "ffn_gate_exps.bias",
    "experts_up_bias": "ffn_up_exps.bias",
    "experts_down_bias": "ffn_down_exps.bias",
    "shared_gate_proj": "ffn_gate_shexp",
    "shared_up_proj": "ffn_up_shexp",
    "shared_down_proj": "ffn_down_shexp",
    "shared_gate": "ffn_gate_inp_shexp",
}
_LAYER = re.compile(r"blk\.\d+\.")
# Parts that the converter splits.
_SPLIT = {
    "experts_gate_up": ("experts_gate", "experts_up"),
    "experts_gate_up_bias": ("experts_gate_bias", "experts_up_bias"),
    "shared_gate_up_proj": ("shared_gate_proj", "shared_up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
}


def stored_names(file: Iterable[str], row: Architecture, tensors: Tensors) -> Tensors:
    """How a file with tensors of these names stores what a family's own files store in another way.

    Which projections are fused and which have a bias, the file's names say.
    """
    held = {_LAYER.sub("", name) for name in file}
    parts = {own for part in tensors.names for own in _SPLIT.get(part, (part,))}
    if "attn_qkv.weight" in held:
        parts.add("qkv_proj")
    if "ffn_gate.weight" in held:
        parts.discard("gate_up_proj")
    own = {**_NAMES, **row.names}
    names = {part: (name,) if isinstance(name := own[part], str) else name for part in parts}
    biases: dict[tuple[str, ...], bool] = {
        (part,): True for part in parts if tensors.has_bias(part) or any(f"{name}.bias" in held for name in names[part])
    }
    return Tensors(
        names=names,
        prefix="",
        biases=biases,
        gains=tensors.gains,
        head_gains=tensors.head_gains,
        norms_with_rope=tensors.norms_with_rope,
        interleaved=row.interleaved,
    )
