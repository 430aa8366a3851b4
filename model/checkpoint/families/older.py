"""Rows of families with LayerNorm and other positions or other names than Llama's."""

from __future__ import annotations

from shoal.model.checkpoint.families.family import ALL, FEED_FORWARD, NORMS, QKV, Family, Tensors
from shoal.model.checkpoint.families.layers import (
    alternating,
    rope_without_alibi,
)
from shoal.model.checkpoint.families.sources import (
    falcon_is_parallel,
    falcon_kv_heads,
    falcon_norm,
    flag,
    four_widths,
    if_narrow,
    integer,
    mpt_slopes,
    root_of_width,
    scaled_slopes,
    slopes,
    when,
)
from shoal.model.checkpoint.families.transform import by_groups, by_parts, by_quarters

LAYER_NORM = {"norm": "layer", "gated": False}
GPT2_KEYS = {
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "rms_norm_eps",
    "activation_function": "hidden_act",
}
DEFAULTS = {"rms_norm_eps": 1e-5, "hidden_act": "gelu_new", "intermediate_size": four_widths}
TIED = {"tie_word_embeddings": True}
# Of `transformer.`, and of its layers.
GPT2_NAMES = {
    "embedding": "transformer.wte",
    "norm": "transformer.ln_f",
    "layer": "transformer.h.{}.",
    "input_norm": "ln_1",
    "feed_forward_norm": "ln_2",
    "up_proj": "mlp.c_fc",
    "down_proj": "mlp.c_proj",
}
GPTJ_NAMES = GPT2_NAMES | {
    "feed_forward_norm": None,
    "o_proj": "attn.out_proj",
    "up_proj": "mlp.fc_in",
    "down_proj": "mlp.fc_out",
}
# Of Megatron, and of its heirs.
FOUR_H = {"up_proj": "mlp.dense_h_to_4h", "down_proj": "mlp.dense_4h_to_h"}
BLOOM_NAMES = FOUR_H | {
    "embedding": "transformer.word_embeddings",
    "norm": "transformer.ln_f",
    "layer": "transformer.h.{}.",
    "qkv_proj": "self_attention.query_key_value",
    "o_proj": "self_attention.dense",
}
# Of fairseq.
FAIRSEQ_NAMES = {
    "o_proj": "self_attn.out_proj",
    "input_norm": "self_attn_layer_norm",
    "feed_forward_norm": "final_layer_norm",
    "up_proj": "fc1",
    "down_proj": "fc2",
}
MASKS = r"\.attn\.(bias|masked_bias|causal_mask)$|attention\.(bias|masked_bias)$"

OLDER: dict[str, Family] = {
    # Radford et al. 2019.
    "gpt2": Family(
        keys=GPT2_KEYS,
        defaults=DEFAULTS | TIED,
        only={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
        ignored=("n_ctx", "reorder_and_upcast_attn"),
        fields=LAYER_NORM,
        rotates=None,
        tensors=Tensors(
            GPT2_NAMES | {"positions": "transformer.wpe", "qkv_proj": "attn.c_attn", "o_proj": "attn.c_proj"},
            prefix="transformer.",
            biases={ALL: True},
            transposed=True,
            ignored=MASKS,
        ),
    ),
    # Li et al. 2023: StarCoder, with one KV head.
    "gpt_bigcode": Family(
        keys=GPT2_KEYS,
        defaults=DEFAULTS | TIED | {"hidden_act": "gelu_pytorch_tanh"},
        only={"scale_attn_weights": (True,)},
        ignored=(
            "n_ctx",
            "attention_softmax_in_fp32",
            "scale_attention_softmax_in_fp32",
            "num_key_value_heads",
            "inference_runner",
            "pre_allocate_kv_cache",
            "max_sequence_length",
            "max_batch_size",
            "pad_key_length",
            "validate_runner_input",
        ),
        fields=LAYER_NORM | {"num_kv_heads": when("multi_query", 1, default=True)},
        rotates=None,
        tensors=Tensors(
            GPT2_NAMES | {"positions": "transformer.wpe", "qkv_proj": "attn.c_attn", "o_proj": "attn.c_proj"},
            prefix="transformer.",
            biases={ALL: True},
            qkv=by_groups,
            ignored=MASKS,
        ),
    ),
    # Black et al. 2021: local attention in every second layer, and scores that are not scaled.
    "gpt_neo": Family(
        keys={
            "num_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "window_size": "sliding_window",
            "layer_norm_epsilon": "rms_norm_eps",
            "activation_function": "hidden_act",
        },
        defaults=DEFAULTS | TIED | {"sliding_window": 256},
        kinds=alternating,
        fields=LAYER_NORM | {"attention_scale": 1.0},
        rotates=None,
        tensors=Tensors(
            GPT2_NAMES
            | {"positions": "transformer.wpe", "o_proj": "attn.attention.out_proj"}
            | {f"{part}_proj": f"attn.attention.{part}_proj" for part in "qkv"},
            prefix="transformer.",
            biases={("o_proj", *FEED_FORWARD, *NORMS): True},
            ignored=MASKS,
        ),
    ),
    # Wang and Komatsuzaki 2021.
    "gptj": Family(
        keys=GPT2_KEYS,
        defaults=DEFAULTS | {"rope_theta": 10_000.0, "rotary_dim": 64},
        only={"scale_attn_weights": (True,), "rotary": (True,)},
        ignored=("n_ctx",),
        fields=LAYER_NORM | {"parallel": True},
        rotary_dim=integer("rotary_dim"),
        tensors=Tensors(
            GPTJ_NAMES | {f"{part}_proj": f"attn.{part}_proj" for part in "qkv"},
            prefix="transformer.",
            biases={(*FEED_FORWARD, *NORMS, "head"): True},
            interleaved=True,
            ignored=MASKS,
        ),
    ),
    # Nijkamp et al. 2023.
    "codegen": Family(
        keys=GPT2_KEYS,
        defaults=DEFAULTS | {"rope_theta": 10_000.0, "rotary_dim": 64},
        only={"scale_attn_weights": (True,)},
        ignored=("n_ctx",),
        fields=LAYER_NORM | {"parallel": True},
        rotary_dim=integer("rotary_dim"),
        tensors=Tensors(
            GPTJ_NAMES | {"qkv_proj": "attn.qkv_proj"},
            prefix="transformer.",
            biases={(*FEED_FORWARD, *NORMS, "head"): True},
            qkv=by_quarters,
            interleaved=True,
            ignored=MASKS,
        ),
    ),
    # Black et al. 2022; Biderman et al. 2023.
    "gpt_neox": Family(
        keys={
            "layer_norm_eps": "rms_norm_eps",
            "rotary_pct": "partial_rotary_factor",
            "rotary_emb_base": "rope_theta",
        },
        defaults={"rms_norm_eps": 1e-5, "hidden_act": "gelu", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
        fields=LAYER_NORM | {"parallel": flag("use_parallel_residual", default=True)},
        tensors=Tensors(
            FOUR_H
            | {
                "embedding": "gpt_neox.embed_in",
                "norm": "gpt_neox.final_layer_norm",
                "head": ("embed_out", "lm_head"),
                "layer": "gpt_neox.layers.{}.",
                "qkv_proj": "attention.query_key_value",
                "o_proj": "attention.dense",
            },
            prefix="gpt_neox.",
            biases={(*QKV, "o_proj"): flag("attention_bias", default=True), (*FEED_FORWARD, *NORMS): True},
            qkv=by_groups,
            ignored=MASKS,
        ),
    ),
    # Elsen et al. 2023.
    "persimmon": Family(
        keys={"layer_norm_eps": "rms_norm_eps"},
        defaults={"rms_norm_eps": 1e-5, "hidden_act": "relu2", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        ignored=("num_key_value_heads",),
        fields=LAYER_NORM | {"qk_norm": when("qk_layernorm", "head", "none", default=True), "qk_norm_kind": "layer"},
        tensors=Tensors(
            FOUR_H
            | {
                "norm": "model.final_layernorm",
                "qkv_proj": "self_attn.query_key_value",
                "o_proj": "self_attn.dense",
                "q_norm": when("qk_layernorm", "self_attn.q_layernorm", default=True),
                "k_norm": when("qk_layernorm", "self_attn.k_layernorm", default=True),
            },
            biases={(*ALL, "q_norm", "k_norm"): True},
            qkv=by_groups,
        ),
    ),
    # Lin et al. 2022.
    "xglm": Family(
        keys={
            "d_model": "hidden_size",
            "ffn_dim": "intermediate_size",
            "num_layers": "num_hidden_layers",
            "attention_heads": "num_attention_heads",
            "activation_function": "hidden_act",
        },
        defaults=TIED | {"rms_norm_eps": 1e-5, "hidden_act": "gelu"},
        fields=LAYER_NORM | {"embedding_multiplier": when("scale_embedding", root_of_width, 1.0, default=True)},
        rotates=None,
        tensors=Tensors(
            FAIRSEQ_NAMES | {"norm": "model.layer_norm"},
            biases={ALL: True},
            first_position=2,
            sinusoidal=True,
            ignored="embed_positions",
        ),
    ),
    # Zhang et al. 2022.  Its model with 350 million parameters has norms after the sums, and a narrow embedding.
    "opt": Family(
        keys={"ffn_dim": "intermediate_size", "activation_function": "hidden_act"},
        defaults=TIED | {"rms_norm_eps": 1e-5, "hidden_act": "relu"},
        only={"layer_norm_elementwise_affine": (True,)},
        ignored=("_remove_final_layer_norm",),
        fields=LAYER_NORM | {"norm_after_sum": when("do_layer_norm_before", False, True, default=True)},
        rotates=None,
        tensors=Tensors(
            FAIRSEQ_NAMES
            | {
                "embedding": "model.decoder.embed_tokens",
                "positions": "model.decoder.embed_positions",
                "layer": "model.decoder.layers.{}.",
                "norm": when(
                    "do_layer_norm_before",
                    when("_remove_final_layer_norm", None, "model.decoder.final_layer_norm"),
                    default=True,
                ),
                "input_norm": when("do_layer_norm_before", "self_attn_layer_norm", default=True),
                "feed_forward_norm": when("do_layer_norm_before", "final_layer_norm", default=True),
                "attention_output_norm": when("do_layer_norm_before", None, "self_attn_layer_norm", default=True),
                "feed_forward_output_norm": when("do_layer_norm_before", None, "final_layer_norm", default=True),
                "project_in": if_narrow("model.decoder.project_in"),
                "project_out": if_narrow("model.decoder.project_out"),
            },
            biases={(*QKV, "o_proj", *FEED_FORWARD): flag("enable_bias", default=True), NORMS: True},
            first_position=2,
        ),
    ),
    # BigScience 2022.
    "bloom": Family(
        keys=GPT2_KEYS | {"n_embed": "hidden_size", "seq_length": "max_position_embeddings"},
        defaults=DEFAULTS | TIED | {"max_position_embeddings": 2048},
        only={"apply_residual_connection_post_layernorm": (False,), "skip_bias_add": (True,)},
        ignored=(
            "attention_softmax_in_fp32",
            "bias_dropout_fusion",
            "masked_softmax_fusion",
            "offset_alibi",
            "slow_but_exact",
            "skip_bias_add_qkv",
        ),
        fields=LAYER_NORM | {"alibi_slopes": slopes},
        rotates=None,
        tensors=Tensors(
            BLOOM_NAMES | {"embedding_norm": "transformer.word_embeddings_layernorm"},
            prefix="transformer.",
            biases={ALL: True},
            qkv=by_groups,
        ),
    ),
    # Almazrouei et al. 2023.
    "falcon": Family(
        keys=GPT2_KEYS
        | {"num_kv_heads": "num_key_value_heads", "n_head_kv": "num_key_value_heads"}
        | {"ffn_hidden_size": "intermediate_size", "activation": "hidden_act"},
        defaults=DEFAULTS | TIED | {"hidden_act": "gelu", "rope_theta": 10_000.0, "max_position_embeddings": 2048},
        only={"apply_residual_connection_post_layernorm": (False,)},
        rotates=rope_without_alibi,
        fields=LAYER_NORM
        | {
            "num_kv_heads": falcon_kv_heads,
            "parallel": falcon_is_parallel,
            "alibi_slopes": scaled_slopes,
        },
        tensors=Tensors(
            BLOOM_NAMES
            | {
                "input_norm": falcon_norm("attention"),
                "feed_forward_norm": falcon_norm("feed_forward"),
            },
            prefix="transformer.",
            biases={(*QKV, "o_proj", *FEED_FORWARD): flag("bias"), NORMS: True},
            qkv=by_groups,
        ),
    ),
    # MosaicML 2023.
    "mpt": Family(
        keys={
            "d_model": "hidden_size",
            "n_heads": "num_attention_heads",
            "n_layers": "num_hidden_layers",
            "max_seq_len": "max_position_embeddings",
            "layer_norm_epsilon": "rms_norm_eps",
        },
        nested="attn_config",
        defaults=TIED | {"rms_norm_eps": 1e-5, "hidden_act": "gelu", "intermediate_size": four_widths},
        only={
            "attn_config.alibi": (True,),
            "attn_config.attn_type": ("multihead_attention",),
            "attn_config.clip_qkv": (),
            "attn_config.prefix_lm": (False,),
            "attn_config.qk_ln": (False,),
            "embedding_fraction": (1.0,),
            "expansion_ratio": (4,),
            "logit_scale": (),
            "no_bias": (True,),
            "norm_type": ("low_precision_layernorm", "layernorm"),
        },
        ignored=(
            *("attn_config.attn_impl", "attn_config.attn_uses_sequence_id", "init_config", "learned_pos_emb"),
            *("tokenizer_name", "verbose"),
        ),
        fields=LAYER_NORM
        | {
            "alibi_slopes": mpt_slopes,
            "attention_scale": lambda fields: fields.optional_number("attn_config.softmax_scale"),
        },
        rotates=None,
        tensors=Tensors(
            {
                "embedding": "transformer.wte",
                "norm": "transformer.norm_f",
                "layer": "transformer.blocks.{}.",
                "input_norm": "norm_1",
                "feed_forward_norm": "norm_2",
                "qkv_proj": "attn.Wqkv",
                "o_proj": "attn.out_proj",
                "up_proj": "ffn.up_proj",
                "down_proj": "ffn.down_proj",
            },
            prefix="transformer.",
            qkv=by_parts,
        ),
    ),
}
