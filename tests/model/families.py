"""A tiny random checkpoint of every configuration that the table of families knows, made by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.model.variations import VARIATIONS

# Of most of them; the shapes are odd on purpose.
BASE: dict[str, Any] = {
    "vocab_size": 1003,
    "hidden_size": 56,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = {"head_dim": 12}
GPT2 = {"n_embd": 56, "n_layer": 2, "n_head": 7, "n_positions": 512}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 16.0,
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 8}
HALF_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 1}
MANY_EXPERTS = {"num_local_experts": 16, "num_experts_per_tok": 4}
LATENT = {
    "num_key_value_heads": 7,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "moe_intermediate_size": 20,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
DEEPSEEK_YARN = YARN | {"mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 32.0, "beta_slow": 1.0}
ROUTED = {"moe_intermediate_size": 20, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 1}
WINDOWS = {"num_hidden_layers": 4, "sliding_window": 12}
SLIDING_LAYERS = WINDOWS | {"layer_types": ["sliding_attention", "full_attention"] * 2}

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", WIDE),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 7}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", WIDE | {"sliding_window": 8}),
    "mixtral": ("mixtral", EXPERTS | {"sliding_window": None}),
    "mixtral-window": ("mixtral", MANY_EXPERTS | {"sliding_window": 9}),
    "ministral3": ("ministral3", {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.3}, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", WINDOWS | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 20, "num_hidden_layers": 3}
        | {"shared_expert_intermediate_size": 28, "decoder_sparse_step": 2},
    ),
    "qwen3": ("qwen3", WIDE),
    "qwen3_moe": (
        "qwen3_moe",
        WIDE
        | {"num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 20, "norm_topk_prob": True}
        | {"mlp_only_layers": [0]},
    ),
    "olmo": ("olmo", {"num_key_value_heads": 7, "clip_qkv": None}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", WINDOWS),
    "olmoe": ("olmoe", {"num_experts": 16, "num_experts_per_tok": 4, "num_key_value_heads": 7}),
    "flex_olmo": ("flex_olmo", {"num_experts": 3, "num_experts_per_tok": 1}),
    "gemma": ("gemma", WIDE),
    "gemma2": ("gemma2", WIDE | WINDOWS | {"query_pre_attn_scalar": 9, "final_logit_softcapping": 2.0}),
    "gemma3": (
        "gemma3_text",
        WIDE
        | SLIDING_LAYERS
        | {"query_pre_attn_scalar": 9}
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            }
        },
    ),
    "phi": ("phi", {"num_key_value_heads": 7}),
    "phi3": ("phi3", {"sliding_window": 11}),
    "phi3-longrope": (
        "phi3",
        {"original_max_position_embeddings": 8, "num_attention_heads": 7}
        | {"rope_parameters": LONGROPE | {"short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.0, 4.0]}},
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt_bigcode": ("gpt_bigcode", GPT2),
    "gpt_bigcode-heads": ("gpt_bigcode", GPT2 | {"multi_query": False}),
    "gptj": ("gptj", GPT2 | {"rotary_dim": 4}),
    "codegen": ("codegen", {"n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 512, "rotary_dim": 4}),
    "gpt_neox": (
        "gpt_neox",
        HALF_ROTARY,
    ),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 1.0}),
    "xglm": ("xglm", {"d_model": 56, "ffn_dim": 72, "num_layers": 2, "attention_heads": 7}),
    "opt": ("opt", {"ffn_dim": 72, "word_embed_proj_dim": 56}),
    "opt-350m": (
        "opt",
        {"ffn_dim": 72, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
    ),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 7}),
    "falcon-7b": ("falcon", {"multi_query": True, "new_decoder_architecture": False, "parallel_attn": True}),
    "falcon-40b": (
        "falcon",
        {"num_attention_heads": 8, "num_kv_heads": 2, "hidden_size": 64, "new_decoder_architecture": True},
    ),
    "falcon-rw": (
        "falcon",
        {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True, "new_decoder_architecture": False},
    ),
    "mpt": ("mpt", {"d_model": 56, "n_heads": 7, "n_layers": 2, "max_seq_len": 512}),
    "starcoder2": ("starcoder2", {"sliding_window": 10}),
    "stablelm": (
        "stablelm",
        HALF_ROTARY | {"use_qkv_bias": True},
    ),
    "stablelm-2-12b": (
        "stablelm",
        {"use_parallel_residual": True, "qk_layernorm": True} | HALF_ROTARY,
    ),
    "deepseek_v2-lite": ("deepseek_v2", LATENT),
    "deepseek_v2": (
        "deepseek_v2",
        LATENT | {"q_lora_rank": 20, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v2-yarn": ("deepseek_v2", LATENT | {"rope_parameters": DEEPSEEK_YARN}),
    "deepseek_v3": ("deepseek_v3", LATENT | {"q_lora_rank": 20, "n_group": 4, "topk_group": 2}),
    "deepseek_v3-yarn": (
        "deepseek_v3",
        LATENT | {"q_lora_rank": 20, "n_group": 1, "topk_group": 1, "rope_parameters": DEEPSEEK_YARN},
    ),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2},
    ),
    "granitemoe": (
        "granitemoe",
        MANY_EXPERTS
        | {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2},
    ),
    "granitemoeshared": ("granitemoeshared", EXPERTS | {"shared_intermediate_size": 28, "embedding_multiplier": 3.0}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "llama4": (
        "llama4_text",
        WIDE
        | {
            "num_hidden_layers": 4,
            "attention_chunk_size": 16,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 40,
        }
        | {"num_local_experts": 3, "num_experts_per_tok": 1, "floor_scale": 8, "no_rope_layers": [1, 0, 1, 1]},
    ),
    "gpt_oss": (
        "gpt_oss",
        WIDE | SLIDING_LAYERS | MANY_EXPERTS | {"num_hidden_layers": 4, "rope_parameters": YARN | {"truncate": False}},
    ),
    "glm": ("glm", WIDE),
    "glm4": ("glm4", WIDE),
    "glm4_moe": (
        "glm4_moe",
        ROUTED | {"head_dim": 16, "use_qk_norm": True, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
    ),
    "cohere": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", WIDE | WINDOWS),
    "nemotron": ("nemotron", {"head_dim": 8}),
    "seed_oss": ("seed_oss", WIDE),
    "exaone4": ("exaone4", WINDOWS | {"sliding_window_pattern": 2}),
    "ernie4_5": ("ernie4_5", WIDE),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 16, "moe_k": 4, "moe_intermediate_size": 20, "moe_num_shared_experts": 2}
        | {"num_hidden_layers": 3, "moe_layer_end_index": -1},
    ),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", WIDE),
    "minimax_m2": ("minimax_m2", WIDE | MANY_EXPERTS),
    "arcee": ("arcee", WIDE),
    "helium": ("helium", {"head_dim": 8}),
    "dots1": ("dots1", ROUTED | {"head_dim": 12, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}),
    "persimmon": ("persimmon", {"num_key_value_heads": 7}),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 2, "num_heads": 7, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
}


def make(name: str, **fields: Any) -> Any:
    """The model of a configuration or variation, with weights large enough that every part of it matters."""
    base, further = VARIATIONS.get(name, (name, {}))
    model_type, changes = CONFIGURATIONS[base]
    known = AutoConfig.for_model(model_type)
    shape = {key: value for key, value in BASE.items() if hasattr(known, key)}
    config = AutoConfig.for_model(model_type, **(shape | changes | further | fields))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim > 1:
                tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=generator)
            elif tensor.is_floating_point():  # gains, biases and sinks, about what they are
                tensor.add_(torch.empty_like(tensor).uniform_(-0.3, 0.3, generator=generator))
    return model.eval()


def write(name: str, folder: Path) -> Path:
    make(name).save_pretrained(folder)
    return folder
