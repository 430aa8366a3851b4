"""Functions of a config's fields, of which the rows of the table are made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from shoal.model.architecture import LatentConfig, Temperature
from shoal.model.checkpoint.families.family import Source, resolve
from shoal.model.checkpoint.families.rope import yarn_magnitude
from shoal.model.checkpoint.parts import Fields

# Values


def integer(name: str, *, minimum: int = 1, default: int | None = None) -> Callable[[Fields], int]:
    return lambda fields: fields.integer(name, minimum=minimum, default=default)


def number(name: str, *, default: float | None = None) -> Callable[[Fields], float]:
    return lambda fields: fields.number(name, minimum=0.0, default=default)


def flag(name: str, *, default: bool = False) -> Callable[[Fields], bool]:
    return lambda fields: fields.flag(name, default=default)


def when(name: str, then: Source, otherwise: Source = None, *, default: bool = False) -> Callable[[Fields], Any]:
    """One source or another, as the flag says."""
    return lambda fields: resolve(then if fields.flag(name, default=default) else otherwise, fields)


def inverse(name: str, *, default: float | None = None) -> Callable[[Fields], float]:
    return lambda fields: 1.0 / _above_zero(fields, name, default)


def inverse_root(name: str, *, default: float | None = None) -> Callable[[Fields], float]:
    return lambda fields: _above_zero(fields, name, default) ** -0.5


def root_of_width(fields: Fields) -> float:
    return math.sqrt(fields.integer("hidden_size", minimum=1))


def four_widths(fields: Fields) -> int:
    return 4 * fields.integer("hidden_size", minimum=1)


def if_narrow(name: str) -> Callable[[Fields], str | None]:
    """The name where the embedding is narrower than the layers (OPT)."""

    def source(fields: Fields) -> str | None:
        hidden = fields.integer("hidden_size", minimum=1)
        return name if fields.integer("word_embed_proj_dim", minimum=1, default=hidden) != hidden else None

    return source


def shared_experts(name: str, *, default: int = 0) -> Callable[[Fields], int]:
    """The width of a number of shared experts together (DeepSeek)."""
    return lambda fields: (
        fields.integer(name, minimum=0, default=default) * fields.integer("moe_intermediate_size", minimum=1)
    )


def if_grouped(name: str) -> Callable[[Fields], int]:
    """A number of groups, if the method of choice looks at them (DeepSeek-V2)."""

    def source(fields: Fields) -> int:
        count = fields.integer(name, minimum=1, default=1)
        return count if fields.get("topk_method") == "group_limited_greedy" else 1

    return source


def _above_zero(fields: Fields, name: str, default: float | None) -> float:
    if (value := fields.number(name, minimum=0.0, default=default)) == 0:
        raise fields.error(name, "expected a number above 0, found 0")
    return value


# Attention


def slopes(fields: Fields) -> tuple[float, ...]:
    """ALiBi as in its paper: a geometric series for a power of two of heads, and every second of a finer one for the
    heads beyond that (BLOOM)."""
    num_heads = fields.integer("num_attention_heads", minimum=1)
    power = 2 ** math.floor(math.log2(num_heads))
    series = [2.0 ** (-8 * head / power) for head in range(1, power + 1)]
    finer = [2.0 ** (-4 * head / power) for head in range(1, 2 * power + 1, 2)]
    return tuple((series + finer)[:num_heads])


def scaled_slopes(fields: Fields) -> tuple[float, ...]:
    """Slopes of scores that are multiplied by 1 / sqrt(head_dim) after ALiBi (Falcon)."""
    if not fields.flag("alibi", default=False):
        return ()
    head_dim = fields.integer("hidden_size", minimum=1) // fields.integer("num_attention_heads", minimum=1)
    return tuple(slope * head_dim**-0.5 for slope in slopes(fields))


def mpt_slopes(fields: Fields) -> tuple[float, ...]:
    """A series for the next power of two of heads, of which every second slope comes first (MPT)."""
    num_heads = fields.integer("num_attention_heads", minimum=1)
    power = 2 ** math.ceil(math.log2(num_heads))
    steepest = fields.number("attn_config.alibi_bias_max", minimum=0.0, default=8.0)
    series = [2.0 ** (-steepest * head / power) for head in range(1, power + 1)]
    return tuple(series if power == num_heads else (series[1::2] + series[::2])[:num_heads])


def falcon_kv_heads(fields: Fields) -> int:
    """Any number in the new architecture; one or all in the old one."""
    num_heads = fields.integer("num_attention_heads", minimum=1)
    stated = fields.integer("num_key_value_heads", minimum=1, default=num_heads)
    only_one = fields.flag("multi_query", default=True)
    if fields.flag("new_decoder_architecture", default=False):
        return stated
    return 1 if only_one else num_heads


def falcon_is_parallel(fields: Fields) -> bool:
    old = fields.flag("parallel_attn", default=True)
    return fields.flag("new_decoder_architecture", default=False) or old


def falcon_norm(kind: str) -> Callable[[Fields], str | None]:
    """The norm before the attention or the feed-forward block."""

    def source(fields: Fields) -> str | None:
        is_new = fields.flag("new_decoder_architecture", default=False)
        count = fields.integer("num_ln_in_parallel_attn", minimum=1, default=2 if is_new else 1)
        if is_new and count == 2:
            return {"attention": "ln_attn", "feed_forward": "ln_mlp"}[kind]
        if kind == "attention":
            return "input_layernorm"
        return None if falcon_is_parallel(fields) else "post_attention_layernorm"

    return source


def latent(fields: Fields) -> LatentConfig:
    """Latent attention (DeepSeek)."""
    return LatentConfig(
        rank=fields.integer("kv_lora_rank", minimum=1),
        rope_dim=fields.integer("qk_rope_head_dim", minimum=2),
        nope_dim=fields.integer("qk_nope_head_dim", minimum=1),
        value_dim=fields.integer("v_head_dim", minimum=1),
        query_rank=fields.integer("q_lora_rank", minimum=0, default=0),
    )


def latent_scale(fields: Fields) -> float:
    """1 / sqrt(head_dim), times the square of YaRN's magnitude (DeepSeek)."""
    width = fields.integer("qk_rope_head_dim", minimum=2) + fields.integer("qk_nope_head_dim", minimum=1)
    rope = rope_object(fields)
    scaled = rope.get("rope_type") or rope.get("type") or "default"
    all_dims = rope.optional_number("mscale_all_dim")
    if scaled == "default" or not all_dims:
        return float(width**-0.5)
    return float(width**-0.5 * yarn_magnitude(rope.number("factor", minimum=1.0), all_dims) ** 2)


def rope_object(fields: Fields) -> Fields:
    """The keys of `rope_parameters`, or of `rope_scaling`."""
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    value = fields.get(name)
    return fields.section(name, value if isinstance(value, dict) else {})


def temperature_of_ministral(fields: Fields, has_rope: bool) -> Temperature | None:
    rope = rope_object(fields)
    scale = rope.optional_number("llama_4_scaling_beta")
    length = rope.integer("original_max_position_embeddings", minimum=1, default=1)
    return Temperature(scale, length) if scale else None


def temperature_of_llama4(fields: Fields, has_rope: bool) -> Temperature | None:
    scale = fields.number("attn_scale", minimum=0.0, default=0.1)
    length = fields.integer("floor_scale", minimum=1, default=8192)
    wanted = fields.flag("attn_temperature_tuning", default=True)
    return Temperature(scale, length, offset=1) if wanted and not has_rope else None
