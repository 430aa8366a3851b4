"""Further shapes of configurations: what the switches of their configs change."""

from __future__ import annotations

from typing import Any


def rope(kind: str = "default", **keys: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **keys}}


def per_kind(full: dict[str, Any]) -> dict[str, Any]:
    return {
        "rope_parameters": {"sliding_attention": rope()["rope_parameters"], "full_attention": full["rope_parameters"]}
    }


ALTERNATING = ["full_attention", "sliding_attention"] * 2

# The configuration, and the keys that differ.
VARIATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-14-heads": ("llama", {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 10}),
    "llama-dynamic": ("llama", rope("dynamic", factor=2.0)),
    "llama-linear": ("llama", rope("linear", factor=2.0)),
    "llama-yarn-as": (
        "llama-yarn",
        rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=0.7, truncate=False),
    ),
    "mistral-nowin": ("mistral", {"sliding_window": None}),
    "qwen2-types": ("qwen2-window", {"layer_types": ALTERNATING}),
    "qwen2-off": ("qwen2-window", {"use_sliding_window": False}),
    "qwen2moe-win": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2}
        | {"qkv_bias": False, "norm_topk_prob": True},
    ),
    "qwen3-bias": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-win": ("qwen3", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}),
    "qwen3moe-win": (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 10, "attention_bias": True}
        | {"norm_topk_prob": False, "mlp_only_layers": []},
    ),
    "olmo-bias": ("olmo", {"attention_bias": True, "num_key_value_heads": 1}),
    "olmo2-bias": ("olmo2", {"attention_bias": True, "num_key_value_heads": 7}),
    "olmo3-types": ("olmo3", {"layer_types": ALTERNATING}),
    "olmo3-yarn": ("olmo3", per_kind(rope("yarn", factor=4.0, original_max_position_embeddings=64))),
    "olmoe-norm": ("olmoe", {"norm_topk_prob": True, "attention_bias": True, "num_key_value_heads": 1}),
    "flex": ("flex_olmo", {"norm_topk_prob": True, "num_experts": 16, "num_experts_per_tok": 4}),
    "gemma-bias": ("gemma", {"attention_bias": True, "tie_word_embeddings": False}),
    "gemma2-untied": (
        "gemma2",
        {"tie_word_embeddings": False, "attn_logit_softcapping": None}
        | {"final_logit_softcapping": None, "attention_bias": True},
    ),
    "gemma3-caps": ("gemma3", {"final_logit_softcapping": 3.0}),
    "phi-qk": ("phi", {"qk_layernorm": True, "num_key_value_heads": 1}),
    "phi-rot": ("phi", rope(partial_rotary_factor=0.25)),
    "phi3-part": (
        "phi3",
        {"num_attention_heads": 4, "num_key_value_heads": 2}
        | {"hidden_size": 64, "tie_word_embeddings": True}
        | rope(partial_rotary_factor=0.75),
    ),
    "gpt2-inner": ("gpt2", {"n_inner": 50, "tie_word_embeddings": False, "activation_function": "relu"}),
    "gpt2-12h": ("gpt2", {"n_embd": 60, "n_head": 12}),
    "bigcode-inner": ("gpt_bigcode", {"n_inner": 50, "tie_word_embeddings": False}),
    "gptj-switches": ("gptj", {"rotary_dim": 8, "tie_word_embeddings": False}),
    "codegen12": ("codegen", {"n_embd": 96, "n_head": 12, "rotary_dim": 8}),
    "neox-nobias": ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": True}),
    "neox-full": ("gpt_neox", {"hidden_act": "gelu_new"} | rope("linear", factor=2.0, partial_rotary_factor=1.0)),
    "xglm-switches": ("xglm", {"scale_embedding": False, "activation_function": "relu"}),
    "opt-nobias": ("opt", {"enable_bias": False}),
    "opt-nolast": ("opt", {"_remove_final_layer_norm": True, "tie_word_embeddings": False}),
    "opt-gelu": ("opt", {"activation_function": "gelu"}),
    "bloom12": ("bloom", {"hidden_size": 60, "num_attention_heads": 12}),
    "bloom5": ("bloom", {"hidden_size": 40, "num_attention_heads": 5, "tie_word_embeddings": False}),
    "falcon11b": ("falcon-40b", {"num_ln_in_parallel_attn": 1, "bias": True}),
    "falcon-mha-par": ("falcon-rw", {"alibi": False, "parallel_attn": True}),
    "falcon-mqa-seq": ("falcon-7b", {"parallel_attn": False, "bias": True}),
    "falcon-mqa-alibi": ("falcon-7b", {"alibi": True, "ffn_hidden_size": 50}),
    "falcon-untied": ("falcon-7b", {"tie_word_embeddings": False, "activation": "gelu"}),
    "mpt8": ("mpt", {"n_heads": 8, "d_model": 64, "attn_config": {"softmax_scale": 0.2}}),
    "star-nobias": ("starcoder2", {"use_bias": False, "tie_word_embeddings": False, "sliding_window": None}),
    "stable": ("stablelm", {"use_qkv_bias": False, "use_parallel_residual": True}),
    "stable-qk": ("stablelm", {"qk_layernorm": True, "num_key_value_heads": 7}),
    "dsv2-bias": ("deepseek_v2", {"attention_bias": True, "n_shared_experts": 1}),
    "dsv2-dense": ("deepseek_v2", {"first_k_dense_replace": 2}),
    "dsv2-7": ("deepseek_v2-lite", {"n_routed_experts": 3, "num_experts_per_tok": 1} | {"tie_word_embeddings": True}),
    "dsv3-nointer": ("deepseek_v3", {"rope_interleave": False, "norm_topk_prob": False} | {"attention_bias": True}),
    "dsv3-lite": ("deepseek_v3", {"q_lora_rank": None, "first_k_dense_replace": 0}),
    "granite-switches": ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "granitemoeshared0": ("granitemoeshared", {"shared_intermediate_size": 0, "attention_bias": True}),
    "smollm3-win": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 9} | {"attention_bias": True, "mlp_bias": True},
    ),
    "llama4-noqk": ("llama4", {"use_qk_norm": False, "attn_temperature_tuning": False, "attention_bias": True}),
    "llama4-nochunk": (
        "llama4",
        {"attention_chunk_size": None, "num_local_experts": 16}
        | {"num_experts_per_tok": 4, "interleave_moe_layer_step": 1},
    ),
    "llama4-moelist": ("llama4", {"moe_layers": [0, 3]}),
    "gptoss-nobias": ("gpt_oss", {"attention_bias": False}),
    "gptoss-3": ("gpt_oss", {"num_local_experts": 3, "num_experts_per_tok": 1} | rope()),
    "glm-nobias": ("glm", {"attention_bias": False} | rope(partial_rotary_factor=1.0)),
    "glm4moe": (
        "glm4_moe",
        {"use_qk_norm": False, "attention_bias": True}
        | {"norm_topk_prob": False, "routed_scaling_factor": 2.0}
        | rope(partial_rotary_factor=0.25),
    ),
    "cohere-noqk": (
        "cohere",
        {"use_qk_norm": False, "attention_bias": True} | {"logit_scale": 0.5, "num_key_value_heads": 7},
    ),
    "cohere2-types": (
        "cohere2",
        {"layer_types": ["full_attention", "full_attention", "full_attention", "sliding_attention"]}
        | {"tie_word_embeddings": False},
    ),
    "nemotron-bias": ("nemotron", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "seed": ("seed_oss", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    "exaone-nowin": (
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 4} | {"sliding_window_pattern": None},
    ),
    "ernie-bias": ("ernie4_5", {"use_bias": True, "tie_word_embeddings": False}),
    "erniemoe": (
        "ernie4_5_moe",
        {"moe_num_shared_experts": 0, "moe_layer_interval": 2, "num_hidden_layers": 4}
        | {"moe_num_experts": 3, "moe_k": 1},
    ),
    "erniemoe-bias": ("ernie4_5_moe", {"use_bias": True}),
    "hunyuan": ("hunyuan_v1_dense", {"attention_bias": True} | rope("dynamic", alpha=100.0, factor=1.0)),
    "minimax": ("minimax_m2", {"num_key_value_heads": 7} | rope(partial_rotary_factor=0.5)),
    "arcee-switches": ("arcee", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "helium-switches": ("helium", {"attention_bias": True, "mlp_bias": True}),
    "dots": ("dots1", {"max_window_layers": 1, "sliding_window": 9} | {"attention_bias": True, "norm_topk_prob": True}),
    "persimmon-switches": ("persimmon", {"qk_layernorm": False, "tie_word_embeddings": True}),
    "gptneo": (
        "gpt_neo",
        {"intermediate_size": 50, "num_layers": 3}
        | {"num_hidden_layers": 3, "attention_types": [[["global", "local", "local"], 1]]},
    ),
    "mixtral-switches": ("mixtral", {"tie_word_embeddings": True, "num_key_value_heads": 7, "head_dim": 10}),
    "ministral": ("ministral3", {"sliding_window": 9, "head_dim": 8}),
}
