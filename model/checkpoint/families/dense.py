"""Rows of dense families of Llama's kind: RoPE and, in most, RMSNorm and a gated feed-forward block."""

from __future__ import annotations

from shoal.model.checkpoint.families.family import (
    ALL,
    ATTENTION,
    FEED_FORWARD,
    NORMS,
    QKV,
    Family,
    Tensors,
)
from shoal.model.checkpoint.families.layers import (
    all_but_every,
    everywhere,
    rope_in_windows,
    rope_in_windows_if_any,
    rope_listed,
    switched,
)
from shoal.model.checkpoint.families.sources import (
    flag,
    inverse,
    inverse_root,
    number,
    root_of_width,
    temperature_of_ministral,
    when,
)

ROPE = {"rope_theta": 10_000.0, "hidden_act": "silu", "rms_norm_eps": 1e-6}
LAYER_NORM_EPS = {"layer_norm_eps": "rms_norm_eps"}
QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
# Norms after the blocks and none before them, of OLMo 2.
NORMS_AFTER = {
    "input_norm": None,
    "attention_output_norm": "post_attention_layernorm",
    "feed_forward_norm": None,
    "feed_forward_output_norm": "post_feedforward_layernorm",
}
GEMMA = {"norm": "rms", "embedding_multiplier": root_of_width}
GEMMA_DEFAULTS = ROPE | {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
# Norms before and after the blocks, of Gemma 2.
GEMMA2_NAMES = {
    "attention_output_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_output_norm": "post_feedforward_layernorm",
}
GRANITE = {
    "embedding_multiplier": number("embedding_multiplier", default=1.0),
    "residual_multiplier": number("residual_multiplier", default=1.0),
    "attention_scale": number("attention_multiplier", default=1.0),
    "logits_multiplier": inverse("logits_scaling", default=1.0),
}
COHERE = {"norm": "layer", "parallel": True, "logits_multiplier": number("logit_scale", default=0.0625)}
COHERE_DEFAULTS = ROPE | {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}

DENSE: dict[str, Family] = {
    # Touvron et al. 2023; Grattafiori et al. 2024.
    "llama": Family(
        defaults=ROPE,
        only={"rope_interleaved": (False,)},
        ignored=("is_llama_config",),
        tensors=Tensors(biases={ATTENTION: flag("attention_bias"), FEED_FORWARD: flag("mlp_bias")}),
    ),
    # Jiang et al. 2023.
    "mistral": Family(
        defaults=ROPE | {"sliding_window": 4096, "num_key_value_heads": 8},
        kinds=everywhere,
    ),
    "ministral3": Family(
        defaults=ROPE | {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 128},
        kinds=everywhere,
        temperature=temperature_of_ministral,
    ),
    # Yang et al. 2024.
    "qwen2": Family(
        defaults=ROPE | {"num_key_value_heads": 32},
        only={"use_mrope": (False,)},
        kinds=switched(lambda layer, bound: layer >= bound),
        tensors=Tensors(biases={QKV: True}),
    ),
    # Yang et al. 2025.
    "qwen3": Family(
        defaults=ROPE | {"num_key_value_heads": 32, "head_dim": 128},
        kinds=switched(lambda layer, bound: layer >= bound),
        fields={"qk_norm": "head"},
        tensors=Tensors(QK_NORMS, biases={ATTENTION: flag("attention_bias")}),
    ),
    # Groeneveld et al. 2024: norms without a gain.
    "olmo": Family(
        defaults=ROPE | {"rms_norm_eps": 1e-5},
        only={"clip_qkv": ()},
        fields={"norm": "layer"},
        tensors=Tensors(gains=False, biases={ATTENTION: flag("attention_bias")}),
    ),
    # OLMo et al. 2025.
    "olmo2": Family(
        defaults=ROPE | {"rms_norm_eps": 1e-5},
        fields={"qk_norm": "whole"},
        tensors=Tensors(NORMS_AFTER | QK_NORMS, biases={ATTENTION: flag("attention_bias")}),
    ),
    "olmo3": Family(
        defaults=ROPE | {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "sliding_window": 4096},
        kinds=all_but_every(4),
        local_rope=True,
        fields={"qk_norm": "whole"},
        tensors=Tensors(NORMS_AFTER | QK_NORMS, biases={ATTENTION: flag("attention_bias")}),
    ),
    # Gemma Team 2024.  Its files say "gelu" for what is the approximation with tanh.
    "gemma": Family(
        defaults=GEMMA_DEFAULTS | {"head_dim": 256},
        only={"hidden_act": ("gelu", "gelu_pytorch_tanh"), "hidden_activation": ("gelu_pytorch_tanh",)},
        fields=GEMMA | {"activation": "gelu_tanh"},
        tensors=Tensors(gain_offset=1.0, biases={ATTENTION: flag("attention_bias")}),
    ),
    "gemma2": Family(
        keys={"hidden_activation": "hidden_act"},
        defaults=GEMMA_DEFAULTS | {"head_dim": 256, "sliding_window": 4096},
        kinds=all_but_every(2),
        fields=GEMMA
        | {
            "attention_scale": inverse_root("query_pre_attn_scalar", default=256),
            "attention_softcap": number("attn_logit_softcapping", default=0.0),
            "logit_softcap": number("final_logit_softcapping", default=0.0),
        },
        tensors=Tensors(GEMMA2_NAMES, gain_offset=1.0, biases={ATTENTION: flag("attention_bias")}),
    ),
    "gemma3_text": Family(
        keys={"hidden_activation": "hidden_act"},
        defaults=GEMMA_DEFAULTS
        | {"head_dim": 256, "sliding_window": 4096, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
        only={"attn_logit_softcapping": (0.0,)},
        kinds=all_but_every(6),
        local_rope=True,
        fields=GEMMA
        | {
            "qk_norm": "head",
            "attention_scale": inverse_root("query_pre_attn_scalar", default=256),
            "logit_softcap": number("final_logit_softcapping", default=0.0),
        },
        tensors=Tensors(GEMMA2_NAMES | QK_NORMS, gain_offset=1.0, biases={ATTENTION: flag("attention_bias")}),
    ),
    # Gunasekar et al. 2023.
    "phi": Family(
        keys=LAYER_NORM_EPS,
        defaults=ROPE | {"rms_norm_eps": 1e-5, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5},
        fields={
            "norm": "layer",
            "parallel": True,
            "gated": False,
            "qk_norm": when("qk_layernorm", "head", "none"),
            "qk_norm_kind": "layer",
        },
        tensors=Tensors(
            {
                "norm": "model.final_layernorm",
                "o_proj": "self_attn.dense",
                "feed_forward_norm": None,
                "up_proj": "mlp.fc1",
                "down_proj": "mlp.fc2",
                "q_norm": when("qk_layernorm", "self_attn.q_layernorm"),
                "k_norm": when("qk_layernorm", "self_attn.k_layernorm"),
            },
            biases={(*ALL, "head", "q_norm", "k_norm"): True},
        ),
    ),
    # Abdin et al. 2024.
    "phi3": Family(
        defaults=ROPE | {"rms_norm_eps": 1e-5},
        only={"full_attn_mod": (1,), "interpolate_factor": (1,), "lm_head_bias": (False,)},
        kinds=everywhere,
        tensors=Tensors({"qkv_proj": "self_attn.qkv_proj", "gate_up_proj": "mlp.gate_up_proj"}),
    ),
    # Lozhkov et al. 2024.
    "starcoder2": Family(
        keys={"norm_epsilon": "rms_norm_eps"},
        defaults=ROPE
        | {
            "rms_norm_eps": 1e-5,
            "hidden_act": "gelu_pytorch_tanh",
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        only={"mlp_type": ("default",), "norm_type": ("layer_norm",)},
        kinds=everywhere,
        fields={"norm": "layer", "gated": False},
        tensors=Tensors(
            {"up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"},
            biases={(*ATTENTION, *FEED_FORWARD): flag("use_bias", default=True), NORMS: True},
        ),
    ),
    # Bellagente et al. 2024.
    "stablelm": Family(
        keys=LAYER_NORM_EPS | {"rope_pct": "partial_rotary_factor"},
        defaults=ROPE | {"rms_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
        fields={
            "norm": "layer",
            "parallel": flag("use_parallel_residual"),
            "qk_norm": when("qk_layernorm", "head", "none"),
            "qk_norm_kind": "layer",
        },
        tensors=Tensors(
            {
                "feed_forward_norm": when("use_parallel_residual", None, "post_attention_layernorm"),
                "q_norm": when("qk_layernorm", "self_attn.q_layernorm.norms.{}"),
                "k_norm": when("qk_layernorm", "self_attn.k_layernorm.norms.{}"),
            },
            biases={QKV: flag("use_qkv_bias"), NORMS: True},
        ),
    ),
    # Stallone et al. 2024.
    "granite": Family(
        defaults=ROPE,
        fields=GRANITE,
        tensors=Tensors(biases={ATTENTION: flag("attention_bias"), FEED_FORWARD: flag("mlp_bias")}),
    ),
    # Bakouch et al. 2025.
    "smollm3": Family(
        defaults=ROPE | {"rope_theta": 2_000_000.0, "num_key_value_heads": 4, "tie_word_embeddings": True},
        kinds=switched(lambda layer, bound: False),
        rotates=rope_listed,
        tensors=Tensors(biases={ATTENTION: flag("attention_bias"), FEED_FORWARD: flag("mlp_bias")}),
    ),
    # GLM Team 2024.
    "glm": Family(
        defaults=ROPE
        | {"rms_norm_eps": 1.5625e-07, "num_key_value_heads": 2, "head_dim": 128, "partial_rotary_factor": 0.5},
        tensors=Tensors(
            {"gate_up_proj": "mlp.gate_up_proj"}, biases={QKV: flag("attention_bias", default=True)}, interleaved=True
        ),
    ),
    "glm4": Family(
        defaults=ROPE
        | {"rms_norm_eps": 1.5625e-07, "num_key_value_heads": 2, "head_dim": 128, "partial_rotary_factor": 0.5},
        tensors=Tensors(
            {
                "gate_up_proj": "mlp.gate_up_proj",
                "attention_output_norm": "post_self_attn_layernorm",
                "feed_forward_output_norm": "post_mlp_layernorm",
            },
            biases={QKV: flag("attention_bias", default=True)},
            interleaved=True,
        ),
    ),
    # Cohere 2024: Command R, whose layers have one norm.
    "cohere": Family(
        keys=LAYER_NORM_EPS,
        defaults=COHERE_DEFAULTS | {"rope_theta": 500_000.0},
        fields=COHERE | {"qk_norm": when("use_qk_norm", "head", "none"), "qk_norm_kind": "layer"},
        tensors=Tensors(
            {"feed_forward_norm": None} | {name: when("use_qk_norm", tensor) for name, tensor in QK_NORMS.items()},
            biases={ATTENTION: flag("attention_bias")},
            interleaved=True,
        ),
    ),
    "cohere2": Family(
        keys=LAYER_NORM_EPS,
        defaults=COHERE_DEFAULTS | {"sliding_window": 4096},
        only={
            "layer_switch": (4,),
            "order_of_interleaved_layers": ("local_attn_first",),
            "position_embedding_type": ("rope_gptj",),
            "rotary_pct": (1.0,),
            "use_gated_activation": (True,),
            "use_parallel_block": (True,),
        },
        ignored=("use_embedding_sharing", "use_parallel_embedding"),
        kinds=all_but_every(4),
        rotates=rope_in_windows,
        fields=COHERE,
        tensors=Tensors({"feed_forward_norm": None}, biases={ATTENTION: flag("attention_bias")}, interleaved=True),
    ),
    # Parmar et al. 2024.
    "nemotron": Family(
        keys={"norm_eps": "rms_norm_eps", "rope_percent": "partial_rotary_factor"},
        defaults=ROPE | {"rms_norm_eps": 1e-5, "hidden_act": "relu2", "partial_rotary_factor": 0.5},
        fields={"norm": "layer", "gated": False},
        tensors=Tensors(
            gain_offset=1.0,
            biases={ATTENTION: flag("attention_bias"), FEED_FORWARD: flag("mlp_bias"), NORMS: True},
        ),
    ),
    # ByteDance 2025.
    "seed_oss": Family(
        defaults=ROPE | {"num_key_value_heads": 8, "head_dim": 128},
        tensors=Tensors(
            biases={
                QKV: flag("attention_bias", default=True),
                ("o_proj",): flag("attention_out_bias"),
                FEED_FORWARD: flag("mlp_bias"),
            }
        ),
    ),
    # LG AI Research 2025.
    "exaone4": Family(
        defaults=ROPE | {"rms_norm_eps": 1e-5, "sliding_window": 4096, "num_key_value_heads": 32},
        kinds=all_but_every(4),
        rotates=rope_in_windows_if_any,
        fields={"qk_norm": "head"},
        tensors=Tensors(NORMS_AFTER | QK_NORMS),
    ),
    # Baidu 2025.
    "ernie4_5": Family(
        defaults=ROPE
        | {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "head_dim": 128, "tie_word_embeddings": True}
        | {"num_key_value_heads": 2},
        tensors=Tensors(biases={(*ATTENTION, *FEED_FORWARD): flag("use_bias")}, interleaved=True),
    ),
    # Tencent 2025.
    "hunyuan_v1_dense": Family(
        defaults=ROPE | {"rms_norm_eps": 1e-5},
        only={
            "norm_type": ("rms",),
            "num_experts": (1,),
            "use_cla": (False,),
            "use_qk_norm": (True,),
            "use_rotary_pos_emb": (True,),
        },
        ignored=(
            *("add_classification_head", "attention_head_dim", "cla_share_factor", "class_num", "dense_list"),
            *("im_end_id", "im_newline_id", "im_start_id", "mask_init_id", "org_vocab_size", "pad_id", "pool_type"),
            *("text_end_id", "text_start_id"),
        ),
        fields={"qk_norm": "head", "qk_norm_after_rope": True},
        tensors=Tensors(
            {"q_norm": "self_attn.query_layernorm", "k_norm": "self_attn.key_layernorm"},
            biases={ATTENTION: flag("attention_bias")},
        ),
    ),
    # Arcee AI 2025.
    "arcee": Family(
        defaults=ROPE | {"rms_norm_eps": 1e-5, "hidden_act": "relu2"},
        fields={"gated": False},
        tensors=Tensors(biases={ATTENTION: flag("attention_bias"), FEED_FORWARD: flag("mlp_bias")}),
    ),
    # Kyutai 2025.
    "helium": Family(
        defaults=ROPE | {"rms_norm_eps": 1e-8, "rope_theta": 100_000.0},
        tensors=Tensors(
            biases={QKV: flag("attention_bias"), FEED_FORWARD: flag("mlp_bias")},
            interleaved=True,
        ),
    ),
}
