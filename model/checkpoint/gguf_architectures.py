"""The architectures of llama.cpp, each as a family of the table: which metadata gives which field of `config.json`.

llama.cpp's converter has brought the tensors of every family into its own names and one form: matrices are [out, in],
a gain is what multiplies, a fused q/k/v projection has all queries, then all keys, then all values.  What is left to
say of an architecture is its family, and the order in which the elements of a head turn together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.model.checkpoint.gguf_metadata import Metadata

Source = Any
"""A metadata key without the architecture's name, or a function of the metadata, or (of another type) a value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A row of the table.

    Attributes:
        family: the `model_type`, or a function of the metadata that gives it.
        interleaved: whether elements 2 i and 2 i + 1 of a head turn together, and not i and i + dim / 2.
        fields: sources of fields of `config.json`, by Llama's names, beyond those that all architectures have.
        rope: the same for `rope_parameters`.
        local_theta: theta of layers with a window, if the file names none; None for that of the others.
        names: of tensors that have other names than in most architectures.
    """

    family: str | Callable[[Metadata], str]
    interleaved: bool = False
    fields: Mapping[str, Source] = field(default_factory=dict)
    rope: Mapping[str, Source] = field(default_factory=dict)
    local_theta: float | None = None
    names: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)


def _has(tensor: str) -> Callable[[Metadata], bool]:
    """Whether the first layer has the tensor."""
    return lambda metadata: f"blk.0.{tensor}" in metadata.tensors


def _if(key: str, then: str, otherwise: str | Callable[[Metadata], str]) -> Callable[[Metadata], str]:
    """One family if the file has a number that is not 0, or another."""

    def family(metadata: Metadata) -> str:
        if metadata.get(key):
            return then
        return otherwise if isinstance(otherwise, str) else otherwise(metadata)

    return family


@dataclass(frozen=True, slots=True)
class Key:
    """A source: the value of a metadata key, or another source where the file has none.

    Attributes:
        positive: whether 0 counts as none.
        factor: multiplies a number.
    """

    key: str
    default: Source = None
    positive: bool = False
    factor: float | None = None

    def __call__(self, metadata: Metadata) -> Any:
        value = metadata.get(self.key)
        if value is None or (self.positive and value == 0):
            return metadata.resolve(self.default)
        return value if self.factor is None else self.factor * metadata.number(self.key, default=0.0)


def _not_0(key: str) -> Key:
    return Key(key, positive=True)


def _layer_types(metadata: Metadata) -> list[str] | None:
    """The kind of each layer, if the file says which have a window: one by one, or all but every n-th one."""
    windows = metadata.flags("attention.sliding_window_pattern", metadata.num_layers)
    if windows is None:
        return None
    return ["sliding_attention" if window else "full_attention" for window in windows]


def _score(default: str) -> Callable[[Metadata], str]:
    """What a router's logits become."""

    def source(metadata: Metadata) -> str:
        number = metadata.integer("expert_gating_func", minimum=0, default=0)
        return {0: default, 1: "softmax", 2: "sigmoid"}.get(number, str(number))

    return source


def _choice(metadata: Metadata) -> str:
    """How DeepSeek chooses experts."""
    if _score("softmax")(metadata) == "sigmoid":
        return "noaux_tc"
    return "greedy" if metadata.integer("expert_group_count", default=1) == 1 else "group_limited_greedy"


def _query_scalar(layers_of_largest: int) -> Callable[[Metadata], float]:
    """What divides Gemma's scores, squared.  No key holds it; llama.cpp tells the largest model by its layers."""

    def source(metadata: Metadata) -> float:
        if metadata.get("block_count") == layers_of_largest:
            return metadata.integer("embedding_length") / metadata.integer("attention.head_count")
        return metadata.head_dim

    return source


def _width(part: str) -> Callable[[Metadata], int]:
    """The width of a head's key or value; older files hold it under the key of other attention."""

    def source(metadata: Metadata) -> int:
        old, new = f"attention.{part}_length", f"attention.{part}_length_mla"
        return metadata.integer(old if metadata.get(new) is None else new)

    return source


def _nope_dim(metadata: Metadata) -> int:
    return _width("key")(metadata) - metadata.integer("rope.dimension_count")


def _is_one_head(metadata: Metadata) -> bool:
    return bool(metadata.get("attention.head_count_kv") == 1)


_WINDOW = {"sliding_window": _not_0("attention.sliding_window")}
_MIXED = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_OWN_WIDTH = _MIXED | {"moe_intermediate_size": "expert_feed_forward_length"}
_AS_OWN_WIDTH = _MIXED | {"intermediate_size": Key("expert_feed_forward_length", "feed_forward_length")}
# Of DeepSeek and its heirs.
_ROUTED = _OWN_WIDTH | {
    "first_k_dense_replace": Key("leading_dense_block_count", 0),
    "n_shared_experts": Key("expert_shared_count", 0),
    "n_group": Key("expert_group_count", 1),
    "topk_group": Key("expert_group_used_count", 1),
    "routed_scaling_factor": Key("expert_weights_scale", 1.0),
    "norm_topk_prob": Key("expert_weights_norm", False),
    "scoring_func": _score("sigmoid"),
}
_LATENT = {
    "kv_lora_rank": "attention.kv_lora_rank",
    "q_lora_rank": "attention.q_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
    "qk_nope_head_dim": _nope_dim,
    "v_head_dim": _width("value"),
    "num_key_value_heads": "attention.head_count",
    "head_dim": None,
}
_CAPS = {name: Key(name, 0.0) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
_GRANITE = {
    "attention_multiplier": Key("attention.scale", lambda metadata: metadata.head_dim**-0.5),
    "embedding_multiplier": Key("embedding_scale", 1.0),
    "residual_multiplier": Key("residual_scale", 1.0),
    "logits_scaling": Key("logit_scale", 1.0),
}
_BIAS = {"attention_bias": _has("attn_q.bias")}
_QK_NORM = {"use_qk_norm": _has("attn_q_norm.weight")}
_NORM_BETWEEN = {"feed_forward_norm": ("post_attention_norm", "ffn_norm")}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        family=_if("expert_count", "mixtral", _if("attention.sliding_window", "mistral", "llama")),
        interleaved=True,
        fields=_WINDOW | _MIXED,
    ),
    "mistral3": Architecture(
        family=_if("attention.temperature_scale", "ministral3", "mistral"),
        interleaved=True,
        fields=_WINDOW,
        rope={
            "mscale": "rope.scaling.yarn_log_multiplier",
            "mscale_all_dim": "rope.scaling.yarn_log_multiplier",
            "llama_4_scaling_beta": "attention.temperature_scale",
        },
    ),
    "llama4": Architecture(
        family="llama4_text",
        interleaved=True,
        fields=_MIXED
        | {
            "intermediate_size_mlp": "feed_forward_length",
            "intermediate_size": "expert_feed_forward_length",
            "interleave_moe_layer_step": "interleave_moe_layer_step",
            "attention_chunk_size": Key("attention.sliding_window", 8192),
            "use_qk_norm": lambda metadata: metadata.get("expert_count") != 128,  # not of Maverick
        },
    ),
    "internlm2": Architecture(family="llama", interleaved=True),
    "xverse": Architecture(family="llama", interleaved=True),
    "exaone": Architecture(family="llama"),
    "qwen2": Architecture(family="qwen2"),
    "qwen2moe": Architecture(
        family="qwen2_moe",
        fields=_OWN_WIDTH
        | {
            "norm_topk_prob": Key("expert_weights_norm", False),
            "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        },
    ),
    "qwen3": Architecture(family="qwen3"),
    "qwen3moe": Architecture(
        family="qwen3_moe", fields=_OWN_WIDTH | {"norm_topk_prob": Key("expert_weights_norm", True)}
    ),
    "gemma": Architecture(family="gemma"),
    "gemma2": Architecture(family="gemma2", fields=_WINDOW | _CAPS | {"query_pre_attn_scalar": _query_scalar(46)}),
    "gemma3": Architecture(
        family="gemma3_text",
        fields=_WINDOW | _CAPS | {"query_pre_attn_scalar": _query_scalar(62), "layer_types": _layer_types},
        local_theta=10_000.0,
    ),
    "phi2": Architecture(family="phi"),
    "phi3": Architecture(family="phi3", fields=_WINDOW),
    "gpt2": Architecture(family="gpt2"),
    "gptj": Architecture(family="gptj", interleaved=True, fields={"rotary_dim": "rope.dimension_count"}),
    "gptneox": Architecture(
        family="gpt_neox",
        fields={
            "use_parallel_residual": Key("use_parallel_residual", True),
            "attention_bias": _has("attn_qkv.bias"),
        },
    ),
    "falcon": Architecture(
        family="falcon",
        fields={
            "new_decoder_architecture": lambda metadata: not _is_one_head(metadata),  # of Falcon 40B and newer
            "num_ln_in_parallel_attn": lambda metadata: 1 + _has("attn_norm_2.weight")(metadata),
            "multi_query": _is_one_head,
            "bias": _has("attn_qkv.bias"),
        },
        names={"input_norm": ("attn_norm_2", "attn_norm"), "feed_forward_norm": "attn_norm"},
    ),
    "bloom": Architecture(family="bloom"),
    "mpt": Architecture(
        family="mpt",
        fields={"attn_config": lambda metadata: {"alibi_bias_max": metadata.get("attention.max_alibi_bias")}},
    ),
    "starcoder": Architecture(family="gpt_bigcode", fields={"multi_query": _is_one_head}),
    "starcoder2": Architecture(family="starcoder2", fields=_WINDOW | {"use_bias": _has("attn_q.bias")}),
    "stablelm": Architecture(
        family="stablelm",
        fields={
            "use_parallel_residual": Key("use_parallel_residual", False),
            "qk_layernorm": _has("attn_q_norm.weight"),
            "use_qkv_bias": _has("attn_q.bias"),
        },
    ),
    "olmo": Architecture(family="olmo", interleaved=True),
    "olmo2": Architecture(
        family=_if("attention.sliding_window", "olmo3", "olmo2"), fields=_WINDOW | {"layer_types": _layer_types}
    ),
    "olmoe": Architecture(family="olmoe", fields=_AS_OWN_WIDTH | {"norm_topk_prob": Key("expert_weights_norm", False)}),
    "granite": Architecture(family="granite", interleaved=True, fields=_GRANITE),
    "granitemoe": Architecture(
        family=_if("expert_shared_feed_forward_length", "granitemoeshared", "granitemoe"),
        interleaved=True,
        fields=_GRANITE | _MIXED | {"shared_intermediate_size": _not_0("expert_shared_feed_forward_length")},
    ),
    "deepseek2": Architecture(
        family=lambda metadata: {"sigmoid": "deepseek_v3"}.get(_score("softmax")(metadata), "deepseek_v2"),
        interleaved=True,
        fields=_ROUTED | _LATENT | {"scoring_func": _score("softmax"), "topk_method": _choice},
        rope={name: Key("rope.scaling.yarn_log_multiplier", factor=10.0) for name in ("mscale", "mscale_all_dim")},
    ),
    "command-r": Architecture(family="cohere", interleaved=True, fields=_QK_NORM | {"logit_scale": "logit_scale"}),
    "cohere2": Architecture(family="cohere2", interleaved=True, fields=_WINDOW | {"logit_scale": "logit_scale"}),
    "chatglm": Architecture(family="glm", interleaved=True, fields={"attention_bias": _has("attn_qkv.bias")}),
    "glm4": Architecture(family="glm4", interleaved=True, fields=_BIAS),
    "glm4moe": Architecture(family="glm4_moe", fields=_ROUTED | _BIAS | _QK_NORM, names=_NORM_BETWEEN),
    "gpt-oss": Architecture(
        family="gpt_oss", fields=_AS_OWN_WIDTH | _WINDOW, rope={"truncate": False}, names=_NORM_BETWEEN
    ),
    "exaone4": Architecture(family="exaone4", fields=_WINDOW | {"layer_types": _layer_types}),
    "smollm3": Architecture(family="smollm3", interleaved=True),
    "arcee": Architecture(family="arcee", interleaved=True),
    "ernie4_5": Architecture(family="ernie4_5", interleaved=True),
    "ernie4_5-moe": Architecture(
        family="ernie4_5_moe",
        interleaved=True,
        fields=_OWN_WIDTH
        | {
            "moe_num_shared_experts": Key("expert_shared_count", 0),
            "moe_layer_start_index": Key("leading_dense_block_count", 0),
            "moe_layer_interval": Key("interleave_moe_layer_step", 1),
        },
    ),
    "hunyuan-dense": Architecture(family="hunyuan_v1_dense"),
    "dots1": Architecture(family="dots1", fields=_ROUTED | _WINDOW),
    "nemotron": Architecture(family="nemotron"),
    "seed_oss": Architecture(
        family="seed_oss", fields=_BIAS | {"attention_out_bias": _has("attn_output.bias")}, names=_NORM_BETWEEN
    ),
    "minimax-m2": Architecture(
        family="minimax_m2",
        fields=_AS_OWN_WIDTH | {"scoring_func": _score("sigmoid"), "rotary_dim": "rope.dimension_count"},
    ),
}
