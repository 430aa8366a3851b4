"""Keys that change no numbers in any family, and families that the record cannot express."""

import re

HARMLESS = frozenset(
    re.findall(
        r"\w+",
        """
        _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _name_or_path
        activation_dropout architectures attention_dropout attention_probs_dropout_prob attn_dropout
        attn_implementation attn_pdrop auto_map bad_words_ids begin_suppress_tokens bos_token_id
        cache_implementation chunk_size_feed_forward classifier_dropout decoder_start_token_id dropout dtype
        emb_pdrop embd_pdrop embed_dropout embedding_dropout eod_token_id eos_token_id
        exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
        gradient_checkpointing hidden_dropout hidden_dropout_prob id2label init_device init_std
        initializer_factor initializer_range is_decoder label2id layerdrop model_max_length model_type
        output_attentions output_hidden_states output_past output_router_logits output_scores pad_token_id
        prefix pretraining_tp problem_type resid_dropout resid_pdrop residual_dropout return_dict
        return_dict_in_generate router_aux_loss_coef router_jitter_noise router_z_loss_coef sep_token_id
        summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
        suppress_tokens task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript
        transformers_version unk_token_id use_bfloat16 use_cache vocab_size
        """,
    )
)
# Keys of some families that do nothing in any other one while they have these values.
INACTIVE = {
    "add_cross_attention": False,
    "alibi": False,
    "attention_bias": False,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "num_nextn_predict_layers": 0,
    "pruned_heads": {},
    "qk_layernorm": False,
    "qkv_bias": False,
    "tie_encoder_decoder": False,
    "use_bias": False,
    "use_bidirectional_attention": False,
    "use_qk_norm": False,
    "use_sliding_window": False,
}

_DELTA = "layers with a gated delta rule are of a kind that no backend has"
_STATE = "layers with a state space (Mamba) are of a kind that no backend has"
_PER_LAYER = "embeddings for each layer are of a kind that no backend has"
REFUSED = {
    "qwen3_next": _DELTA,
    "qwen3_5": _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe": _DELTA,
    "qwen3_5_moe_text": _DELTA,
    "mamba": _STATE,
    "mamba2": _STATE,
    "falcon_mamba": _STATE,
    "jamba": _STATE,
    "bamba": _STATE,
    "zamba": _STATE,
    "zamba2": _STATE,
    "falcon_h1": _STATE,
    "nemotron_h": _STATE,
    "granitemoehybrid": _STATE,
    "lfm2": "layers with short convolutions are of a kind that no backend has",
    "lfm2_moe": "layers with short convolutions are of a kind that no backend has",
    "gemma3n": _PER_LAYER,
    "gemma3n_text": _PER_LAYER,
    "gemma4": _PER_LAYER,
    "gemma4_text": _PER_LAYER,
    "minimax": "layers with lightning attention are of a kind that no backend has",
    "minimax_m1": "layers with lightning attention are of a kind that no backend has",
    "bitnet": "its quantisation to three values is its own, which no backend has",
}
