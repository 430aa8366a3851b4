"""What a checkpoint says about its model: `config.json` and `generation_config.json`, read strictly.

A family is a set of fields, not a class.  A field that would change the numbers and that no backend implements is
refused by name, because a model that answers wrongly is worse than one that does not load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from shoal.model.checkpoint.format import CheckpointFormat, open_checkpoint
from shoal.model.checkpoint.parts import Fields
from shoal.model.record import DType, ModelConfig, RopeConfig, RopeScaling

# Defaults of the fields that a file may leave out.
_FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"rope_theta": 10_000.0, "attention_bias": False, "mlp_bias": False},
    "MixtralForCausalLM": {"rope_theta": 1_000_000.0, "num_key_value_heads": 8},
}
_ROPE_FIELDS: dict[str, set[str]] = {
    "none": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "factors": {"factors"},
}
_ROPE_COMMON_FIELDS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """The sampling that a checkpoint recommends; None where it leaves a field out.

    A server uses these for the fields that a request leaves out, before its own defaults.  An explicit
    `"do_sample": false` recommends temperature 0.  A missing `do_sample` does not, although transformers would then
    decode greedily: most files hold token ids only.  A checkpoint that recommends no sampling at all gets
    `UNSTATED_SAMPLING`.

    Attributes:
        eos_token_ids: tokens that end a generation; empty where the file names none.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()


# At temperature 1 without a cut-off, small models write gibberish; these are llama.cpp's defaults.
UNSTATED_SAMPLING = GenerationDefaults(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05)


def load_config(checkpoint: Path | CheckpointFormat) -> ModelConfig:
    """Read a folder's `config.json`, as transformers 4 (`rope_scaling`, `torch_dtype`) or 5 (`rope_parameters`,
    `dtype`) writes it, or a GGUF file's metadata.

    Raises:
        CheckpointError: naming the file and the field that is missing, malformed, inconsistent or unsupported.
    """
    fields = open_checkpoint(checkpoint).config()
    architecture = _architecture(fields)
    fields = replace(fields, values={**_FAMILIES[architecture], **fields.values})
    _refuse_unsupported(fields)
    is_moe = architecture == "MixtralForCausalLM"
    hidden_size = fields.integer("hidden_size", minimum=1)
    num_heads = fields.integer("num_attention_heads", minimum=1)
    head_dim = _head_dim(fields, hidden_size, num_heads)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", minimum=1),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", minimum=1),
        num_layers=fields.integer("num_hidden_layers", minimum=1),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", minimum=1, default=num_heads),
        head_dim=head_dim,
        num_experts=fields.integer("num_local_experts", minimum=1) if is_moe else 0,
        num_experts_per_tok=fields.integer("num_experts_per_tok", minimum=1) if is_moe else 0,
        rms_norm_eps=fields.number("rms_norm_eps", minimum=0.0),
        rope=_rope(fields, head_dim),
        max_position_embeddings=fields.integer("max_position_embeddings", minimum=1),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        dtype=_dtype(fields),
        bos_token_id=fields.optional_integer("bos_token_id"),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )
    _check_consistent(fields, config)
    return config


def load_generation_defaults(checkpoint: Path | CheckpointFormat) -> GenerationDefaults:
    """Read a folder's `generation_config.json`, which may be missing, or what a GGUF file recommends.

    Where the checkpoint states a field of sampling, the fields that it does not state stay None.

    Raises:
        CheckpointError: naming the file and the malformed field.
    """
    fields = open_checkpoint(checkpoint).generation_config()
    greedy = not fields.flag("do_sample", default=True)
    stated = GenerationDefaults(
        temperature=0.0 if greedy else fields.optional_number("temperature"),
        top_k=fields.optional_integer("top_k"),
        top_p=fields.optional_number("top_p"),
        min_p=fields.optional_number("min_p"),
        repetition_penalty=fields.optional_number("repetition_penalty"),
    )
    sampling = UNSTATED_SAMPLING if stated == GenerationDefaults() else stated
    return replace(sampling, eos_token_ids=fields.token_ids("eos_token_id"))


def _architecture(fields: Fields) -> str:
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise fields.error("architectures", f"expected a list of one name, found {names!r}")
    if names[0] not in _FAMILIES:
        raise fields.error("architectures", f"{names[0]!r} is not supported; supported: {', '.join(_FAMILIES)}")
    return names[0]


def _refuse_unsupported(fields: Fields) -> None:
    """Refuse settings that would change the numbers and that no backend implements."""
    for name in ("attention_bias", "mlp_bias"):
        if fields.flag(name, default=False):
            raise fields.error(name, "true is not supported")
    if fields.get("quantization_config") is not None:
        raise fields.error("quantization_config", "quantized checkpoints are not supported")
    activation = fields.get("hidden_act")
    if activation not in (None, "silu"):
        raise fields.error("hidden_act", f"{activation!r} is not supported; supported: silu")
    window = fields.optional_integer("sliding_window")
    if window is not None and window < fields.integer("max_position_embeddings", minimum=1):
        raise fields.error("sliding_window", f"{window}: attention over a sliding window is not supported")
    types = fields.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(kind != "full_attention" for kind in types)):
        raise fields.error("layer_types", "only full_attention is supported")


def _head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    if fields.get("head_dim") is None and hidden_size % num_heads:
        raise fields.error("hidden_size", f"{hidden_size} is not a multiple of num_attention_heads {num_heads}")
    head_dim = fields.integer("head_dim", minimum=2, default=hidden_size // num_heads)
    if head_dim % 2:
        raise fields.error("head_dim", f"{head_dim} is odd; rotary embedding turns pairs")
    return head_dim


def _rope(fields: Fields, head_dim: int) -> RopeConfig:
    """The rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    section = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    raw = fields.get(section) or {}
    if not isinstance(raw, dict):
        raise fields.error(section, f"expected an object, found {type(raw).__name__}")
    kind = raw.get("rope_type", raw.get("type", "default"))
    scaling: RopeScaling = "none" if kind == "default" else cast(RopeScaling, kind)
    if scaling not in get_args(RopeScaling):
        raise fields.error(section, f"rope type {kind!r} is not supported; supported: default, linear, llama3")
    unknown = set(raw) - _ROPE_COMMON_FIELDS - _ROPE_FIELDS[scaling]
    if unknown:
        raise fields.error(section, f"{', '.join(sorted(unknown))}: unknown for rope type {kind!r}")
    rope = fields.section(section, {"rope_theta": fields.get("rope_theta"), **raw})
    for owner in (rope, fields):
        if owner.number("partial_rotary_factor", minimum=0.0, default=1.0) != 1.0:
            raise owner.error("partial_rotary_factor", "only 1 is supported")
    theta = rope.number("rope_theta", minimum=1.0)
    if scaling == "none":
        return RopeConfig(theta)
    if scaling == "factors":
        return RopeConfig(theta, scaling, factors=_rope_factors(rope, head_dim // 2))
    factor = rope.number("factor", minimum=1.0)
    if scaling == "linear":
        return RopeConfig(theta, scaling, factor)
    low, high = rope.number("low_freq_factor", minimum=0.0), rope.number("high_freq_factor", minimum=0.0)
    if not 0 < low < high:
        raise rope.error("low_freq_factor", f"{low} is not above 0 and below high_freq_factor {high}")
    original = rope.integer("original_max_position_embeddings", minimum=1)
    return RopeConfig(theta, scaling, factor, low, high, original)


def _rope_factors(rope: Fields, count: int) -> tuple[float, ...]:
    factors = rope.get("factors")
    if not isinstance(factors, list) or len(factors) != count:
        raise rope.error("factors", f"expected {count} numbers, found {factors!r}")
    if not all(isinstance(factor, float) and 0 < factor < math.inf for factor in factors):
        raise rope.error("factors", "not all are above 0 and finite")
    return tuple(factors)


def _dtype(fields: Fields) -> DType:
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value: DType = fields.get(name) or "float32"
    if value not in get_args(DType):
        raise fields.error(name, f"{value!r} is not supported; supported: {', '.join(get_args(DType))}")
    return value


def _check_consistent(fields: Fields, config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise fields.error(
            "num_attention_heads", f"{config.num_heads} is not a multiple of num_key_value_heads {config.num_kv_heads}"
        )
    if config.num_experts_per_tok > config.num_experts:
        raise fields.error(
            "num_experts_per_tok", f"{config.num_experts_per_tok} exceeds num_local_experts {config.num_experts}"
        )
    for name, ids in (("bos_token_id", (config.bos_token_id,)), ("eos_token_id", config.eos_token_ids)):
        if any(i is not None and not 0 <= i < config.vocab_size for i in ids):
            raise fields.error(name, f"{list(ids)} is not within vocab_size {config.vocab_size}")
