"""Rows of families with a mixture of experts."""

from __future__ import annotations

from shoal.model.checkpoint.families.dense import GRANITE, NORMS_AFTER, QK_NORMS, ROPE
from shoal.model.checkpoint.families.family import ATTENTION, FEED_FORWARD, QKV, Family, Mixture, Source, Tensors
from shoal.model.checkpoint.families.layers import (
    all_but_every,
    chunks_with_rope,
    every_interleaved,
    every_sparse_step,
    everywhere,
    everywhere_if_used,
    from_layer,
    from_window_layer,
    listed,
    rope_listed,
    switched,
    within_layers,
)
from shoal.model.checkpoint.families.sources import (
    flag,
    if_grouped,
    integer,
    latent,
    latent_scale,
    number,
    shared_experts,
    temperature_of_llama4,
    when,
)

EXPERT_WIDTH = {"intermediate_size": integer("intermediate_size")}
OWN_WIDTH = {"intermediate_size": integer("moe_intermediate_size")}
NUM_EXPERTS = {"num_experts": "num_local_experts"}
ROUTED = {"n_routed_experts": "num_local_experts"}
CORRECTION = {"correction": "mlp.gate.e_score_correction_bias"}
# Of DeepSeek-V3: the best groups by the sum of their two best experts, with a correction for the choice.
V3 = OWN_WIDTH | {
    "score": "sigmoid",
    "renormalise": flag("norm_topk_prob", default=True),
    "scale": number("routed_scaling_factor", default=1.0),
    "num_groups": integer("n_group", default=1),
    "num_chosen_groups": integer("topk_group", default=1),
    "group_score": "top2",
    "shared_size": shared_experts("n_shared_experts"),
}
V3_ONLY = {"scoring_func": ("sigmoid", "noaux_tc"), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)}
FURTHER_LAYERS = integer("num_nextn_predict_layers", minimum=0, default=0)
# What training alone reads, and what follows from other keys.
V3_IGNORED = ("aux_loss_alpha", "ep_size", "seq_aux", "qk_head_dim", "head_dim")
LATENT_NAMES = {
    "q_down": "self_attn.q_a_proj",
    "q_down_norm": "self_attn.q_a_layernorm",
    "q_up": "self_attn.q_b_proj",
    "kv_down": "self_attn.kv_a_proj_with_mqa",
    "kv_norm": "self_attn.kv_a_layernorm",
    "kv_up": "self_attn.kv_b_proj",
}
LATENT_BIASES: dict[tuple[str, ...], Source] = {("q_down", "kv_down", "o_proj"): flag("attention_bias")}
MIXTRAL_NAMES = {
    "router": ("block_sparse_moe.gate", "mlp.gate"),
    "expert_gate_proj": "block_sparse_moe.experts.{}.w1",
    "expert_up_proj": "block_sparse_moe.experts.{}.w3",
    "expert_down_proj": "block_sparse_moe.experts.{}.w2",
}
GRANITE_NAMES = {
    "router": ("block_sparse_moe.router.layer", "block_sparse_moe.router"),
    "experts_gate_up": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
    "experts_down": ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
}

MIXTURES: dict[str, Family] = {
    # Jiang et al. 2024.
    "mixtral": Family(
        defaults=ROPE | {"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "num_key_value_heads": 8},
        kinds=everywhere,
        mixture=Mixture(EXPERT_WIDTH),
        tensors=Tensors(MIXTRAL_NAMES),
    ),
    "qwen2_moe": Family(
        keys=NUM_EXPERTS,
        defaults=ROPE | {"num_key_value_heads": 16},
        kinds=switched(lambda layer, bound: layer % 2 == 0 and layer < bound),
        mixture=Mixture(
            OWN_WIDTH
            | {
                "renormalise": flag("norm_topk_prob"),
                "shared_size": integer("shared_expert_intermediate_size", default=5632),
            },
            layers=every_sparse_step,
        ),
        tensors=Tensors(
            {f"shared_{part}_proj": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")}
            | {"shared_gate": "mlp.shared_expert_gate"},
            biases={QKV: flag("qkv_bias", default=True)},
        ),
    ),
    "qwen3_moe": Family(
        keys=NUM_EXPERTS,
        defaults=ROPE | {"num_key_value_heads": 4},
        ignored=("max_window_layers",),
        kinds=everywhere_if_used,
        fields={"qk_norm": "head"},
        mixture=Mixture(OWN_WIDTH | {"renormalise": flag("norm_topk_prob")}, layers=every_sparse_step),
        tensors=Tensors(QK_NORMS, biases={ATTENTION: flag("attention_bias")}),
    ),
    # Muennighoff et al. 2024.
    "olmoe": Family(
        keys=NUM_EXPERTS,
        defaults=ROPE | {"rms_norm_eps": 1e-5},
        only={"clip_qkv": ()},
        fields={"qk_norm": "whole"},
        mixture=Mixture(EXPERT_WIDTH | {"renormalise": flag("norm_topk_prob")}),
        tensors=Tensors(QK_NORMS, biases={ATTENTION: flag("attention_bias")}),
    ),
    "flex_olmo": Family(
        keys=NUM_EXPERTS,
        defaults=ROPE | {"rope_theta": 500_000.0},
        fields={"qk_norm": "whole"},
        mixture=Mixture(EXPERT_WIDTH | {"renormalise": flag("norm_topk_prob")}),
        tensors=Tensors(NORMS_AFTER | QK_NORMS, biases={ATTENTION: flag("attention_bias")}),
    ),
    # DeepSeek-AI 2024.
    "deepseek_v2": Family(
        keys=ROUTED,
        defaults=ROPE,
        only={
            "scoring_func": ("softmax",),
            "topk_method": ("greedy", "group_limited_greedy"),
            "norm_topk_prob": (False,),
            "moe_layer_freq": (1,),
            "mlp_bias": (False,),
        },
        ignored=V3_IGNORED,
        latent=latent,
        fields={"attention_scale": latent_scale},
        mixture=Mixture(
            OWN_WIDTH
            | {
                "renormalise": False,
                "scale": number("routed_scaling_factor", default=1.0),
                "num_groups": if_grouped("n_group"),
                "num_chosen_groups": if_grouped("topk_group"),
                "shared_size": shared_experts("n_shared_experts"),
            },
            layers=from_layer("first_k_dense_replace"),
        ),
        tensors=Tensors(LATENT_NAMES, biases=LATENT_BIASES, interleaved=True),
    ),
    "deepseek_v3": Family(
        keys=ROUTED,
        defaults=ROPE,
        only=V3_ONLY,
        ignored=V3_IGNORED,
        latent=latent,
        fields={"attention_scale": latent_scale},
        mixture=Mixture(
            V3 | {"scale": number("routed_scaling_factor", default=2.5)},
            layers=from_layer("first_k_dense_replace", 3),
        ),
        tensors=Tensors(
            LATENT_NAMES | CORRECTION,
            biases=LATENT_BIASES,
            interleaved=flag("rope_interleave", default=True),
            further_layers=FURTHER_LAYERS,
        ),
    ),
    # Zhipu AI 2025.
    "glm4_moe": Family(
        keys=ROUTED,
        defaults=ROPE | {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "partial_rotary_factor": 0.5},
        only=V3_ONLY,
        fields={"qk_norm": when("use_qk_norm", "head", "none")},
        mixture=Mixture(V3, layers=from_layer("first_k_dense_replace", 1)),
        tensors=Tensors(
            CORRECTION | {name: when("use_qk_norm", tensor) for name, tensor in QK_NORMS.items()},
            biases={QKV: flag("attention_bias")},
            further_layers=FURTHER_LAYERS,
        ),
    ),
    # Xiaohongshu 2025.
    "dots1": Family(
        keys=ROUTED,
        defaults=ROPE | {"sliding_window": 4096},
        only=V3_ONLY,
        kinds=listed(from_window_layer),
        fields={"qk_norm": "head"},
        mixture=Mixture(V3 | {"renormalise": flag("norm_topk_prob")}, layers=from_layer("first_k_dense_replace")),
        tensors=Tensors(CORRECTION | QK_NORMS, biases={ATTENTION: flag("attention_bias")}),
    ),
    "granitemoe": Family(
        defaults=ROPE,
        fields=GRANITE,
        mixture=Mixture(EXPERT_WIDTH),
        tensors=Tensors(GRANITE_NAMES, biases={ATTENTION: flag("attention_bias")}),
    ),
    "granitemoeshared": Family(
        defaults=ROPE,
        fields=GRANITE,
        mixture=Mixture(EXPERT_WIDTH | {"shared_size": integer("shared_intermediate_size", minimum=0, default=0)}),
        tensors=Tensors(
            GRANITE_NAMES
            | {"shared_gate_up_proj": "shared_mlp.input_linear", "shared_down_proj": "shared_mlp.output_linear"},
            biases={ATTENTION: flag("attention_bias")},
        ),
    ),
    # Meta 2025.
    "llama4_text": Family(
        defaults=ROPE
        | {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "num_key_value_heads": 8}
        | {"attention_chunk_size": 8192, "num_local_experts": 16, "num_experts_per_tok": 1},
        ignored=("for_llm_compressor", "intermediate_size_mlp"),
        kinds=listed(chunks_with_rope),
        rotates=rope_listed,
        temperature=temperature_of_llama4,
        fields={"qk_norm": when("use_qk_norm", "head", "none", default=True), "qk_norm_after_rope": True},
        dense_width=integer("intermediate_size_mlp"),
        mixture=Mixture(
            EXPERT_WIDTH
            | {
                "score": "sigmoid",
                "renormalise": False,
                "share_on_input": True,
                "shared_size": integer("intermediate_size"),
            },
            layers=every_interleaved,
        ),
        tensors=Tensors(
            {f"{part}_proj": f"feed_forward.{part}_proj" for part in ("gate", "up", "down")}
            | {f"shared_{part}_proj": f"feed_forward.shared_expert.{part}_proj" for part in ("gate", "up", "down")}
            | {
                "router": "feed_forward.router",
                "experts_gate_up": "feed_forward.experts.gate_up_proj",
                "experts_down": "feed_forward.experts.down_proj",
                "q_norm": when("use_qk_norm", "qk_norm", default=True),
                "k_norm": when("use_qk_norm", "qk_norm", default=True),
            },
            biases={ATTENTION: flag("attention_bias")},
            head_gains=False,
            norms_with_rope=True,
            interleaved=True,
            experts_transposed=True,
        ),
    ),
    # OpenAI 2025.
    "gpt_oss": Family(
        defaults=ROPE
        | {"rms_norm_eps": 1e-5, "rope_theta": 150_000.0, "num_key_value_heads": 8, "head_dim": 64}
        | {"sliding_window": 128},
        only={"hidden_act": ("silu",), "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
        ignored=("experts_per_token", "initial_context_length"),
        kinds=all_but_every(2),
        fields={"activation": "clamped_silu"},
        mixture=Mixture(EXPERT_WIDTH),
        tensors=Tensors(
            {
                "router": "mlp.router",
                "experts_gate_up_bias": "mlp.experts.gate_up_proj_bias",
                "experts_down_bias": "mlp.experts.down_proj_bias",
                "sinks": "self_attn.sinks",
            },
            biases={ATTENTION: flag("attention_bias", default=True), ("router",): True},
            experts_transposed=True,
            experts_alternate=True,
        ),
    ),
    "ernie4_5_moe": Family(
        keys={"moe_num_experts": "num_local_experts", "moe_k": "num_experts_per_tok"},
        defaults=ROPE
        | {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "num_key_value_heads": 4, "tie_word_embeddings": True},
        only={"moe_gate": ("topk",), "moe_use_aux_free": (True,)},
        ignored=("moe_norm_min", "moe_capacity", "moe_aux_loss_lambda", "moe_orthogonal_loss_lambda"),
        mixture=Mixture(
            OWN_WIDTH | {"shared_size": shared_experts("moe_num_shared_experts", default=2)}, layers=within_layers
        ),
        tensors=Tensors(
            {"correction": ("mlp.moe_statics.e_score_correction_bias", "mlp.gate.moe_statics.e_score_correction_bias")},
            biases={
                (*ATTENTION, *FEED_FORWARD, "shared_gate_proj", "shared_up_proj", "shared_down_proj", "head"): flag(
                    "use_bias"
                )
            },
            interleaved=True,
            ignored=r"\bmtp_",
        ),
    ),
    "minimax_m2": Family(
        defaults=ROPE | {"rope_theta": 5_000_000.0, "num_key_value_heads": 8},
        only={"scoring_func": ("sigmoid",), "use_qk_norm": (True,), "qk_norm_type": ("per_layer",)}
        | {"use_routing_bias": (True,), "shared_intermediate_size": (0,), "attn_type_list": (1,)}
        | {f"layernorm_{kind}_beta": (1.0,) for kind in ("full_attention", "linear_attention", "mlp")},
        ignored=("mlp_intermediate_size", "mtp_transformer_layers", "num_mtp_modules", "shared_moe_mode", "use_mtp"),
        fields={"qk_norm": "whole"},
        rotary_dim=lambda fields: fields.optional_integer("rotary_dim"),
        mixture=Mixture(EXPERT_WIDTH | {"score": "sigmoid"}),
        tensors=Tensors(
            MIXTRAL_NAMES
            | QK_NORMS
            | {"correction": ("block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias")}
        ),
    ),
}
