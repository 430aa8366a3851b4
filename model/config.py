"""What a checkpoint says about its model: `config.json` and `generation_config.json`, read strictly.

A family is what its fields say, not a class.  Anything in the file that would change the numbers and that no backend
implements is refused by name, because a model that answers wrongly is worse than one that does not load.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from scheduler.errors import CheckpointError

RopeScaling = Literal["none", "linear", "llama3"]
DType = Literal["float32", "bfloat16", "float16"]

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

# What the format means where a file leaves a field out.
_FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"rope_theta": 10_000.0, "attention_bias": False, "mlp_bias": False},
    "MixtralForCausalLM": {"rope_theta": 1_000_000.0, "num_key_value_heads": 8},
}
_ROPE_FIELDS: dict[str, set[str]] = {
    "none": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
_ROPE_COMMON_FIELDS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021): pair i of a head turns by position * theta ** (-2 i / head_dim).

    Attributes:
        scaling: "none"; "linear" divides every frequency by `factor` (Chen et al. 2023); "llama3" divides those with
            a wavelength above original_max_position_embeddings / low_freq_factor, keeps those below
            original_max_position_embeddings / high_freq_factor, and blends between.
    """

    theta: float
    scaling: RopeScaling = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture of a decoder-only transformer.

    Attributes:
        architecture: the name in the checkpoint, such as "MixtralForCausalLM".
        intermediate_size: width of the feed-forward block, or of each expert.
        num_experts: 0 for a dense model.
        num_experts_per_tok: experts a token is routed to; 0 for a dense model.
        max_position_embeddings: most tokens of one sequence.
        dtype: of the checkpoint's tensors, as the file claims.
        bos_token_id, eos_token_ids: None and empty where the file names none.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: DType
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """The sampling that a checkpoint recommends; None where it says nothing.

    A server uses these for the fields that a request leaves out, before its own defaults.  An explicit
    `"do_sample": false` recommends temperature 0.  Its mere absence does not: transformers would decode greedily, but
    most files hold token ids only, and a user of this API expects temperature 1.

    Attributes:
        eos_token_ids: tokens that end a generation; empty where the file names none.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()


def load_config(folder: Path) -> ModelConfig:
    """Read `folder/config.json`, as transformers 4 (`rope_scaling`, `torch_dtype`) or 5 (`rope_parameters`, `dtype`)
    writes it.

    Raises:
        CheckpointError: naming the file and the field that is missing, malformed, inconsistent or unsupported.
    """
    path = folder / "config.json"
    raw = read_json(path)
    architecture = _architecture(path, raw)
    fields = _Fields(path, {**_FAMILIES[architecture], **raw})
    _refuse_unsupported(fields)
    is_moe = architecture == "MixtralForCausalLM"
    hidden_size = fields.integer("hidden_size", minimum=1)
    num_heads = fields.integer("num_attention_heads", minimum=1)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", minimum=1),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", minimum=1),
        num_layers=fields.integer("num_hidden_layers", minimum=1),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", minimum=1, default=num_heads),
        head_dim=_head_dim(fields, hidden_size, num_heads),
        num_experts=fields.integer("num_local_experts", minimum=1) if is_moe else 0,
        num_experts_per_tok=fields.integer("num_experts_per_tok", minimum=1) if is_moe else 0,
        rms_norm_eps=fields.number("rms_norm_eps", minimum=0.0),
        rope=_rope(fields),
        max_position_embeddings=fields.integer("max_position_embeddings", minimum=1),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        dtype=_dtype(fields),
        bos_token_id=fields.optional_integer("bos_token_id"),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )
    _check_consistent(fields, config)
    return config


def load_generation_defaults(folder: Path) -> GenerationDefaults:
    """Read `folder/generation_config.json`; a missing file recommends nothing.

    Raises:
        CheckpointError: naming the file and the malformed field.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return GenerationDefaults()
    fields = _Fields(path, read_json(path))
    greedy = not fields.flag("do_sample", default=True)
    return GenerationDefaults(
        temperature=0.0 if greedy else fields.optional_number("temperature"),
        top_k=fields.optional_integer("top_k"),
        top_p=fields.optional_number("top_p"),
        min_p=fields.optional_number("min_p"),
        repetition_penalty=fields.optional_number("repetition_penalty"),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def bytes_per_block(config: ModelConfig, dtype: str, block_size: int) -> int:
    """Bytes of KV cache that one block of `block_size` tokens takes, over all layers, with elements of `dtype`."""
    elements = 2 * config.num_layers * config.num_kv_heads * config.head_dim * block_size
    return elements * DTYPE_BYTES[dtype]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file.

    Raises:
        CheckpointError: naming the file, if it cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", param=path.name) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}", param=path.name) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}", param=path.name)
    return value


def _architecture(path: Path, raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(f"{path}: architectures: expected a list of one name, found {names!r}", param=path.name)
    if names[0] not in _FAMILIES:
        raise CheckpointError(
            f"{path}: architectures: {names[0]!r} is not supported; supported: {', '.join(_FAMILIES)}",
            param=path.name,
        )
    return names[0]


def _refuse_unsupported(fields: _Fields) -> None:
    """Refuse whatever is set in the file, would change the numbers, and is implemented by no backend."""
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
    num_layers = fields.integer("num_hidden_layers", minimum=1)
    if fields.get("layer_types") not in (None, ["full_attention"] * num_layers):
        raise fields.error("layer_types", "only full_attention is supported")


def _head_dim(fields: _Fields, hidden_size: int, num_heads: int) -> int:
    if fields.get("head_dim") is None and hidden_size % num_heads:
        raise fields.error("hidden_size", f"{hidden_size} is not a multiple of num_attention_heads {num_heads}")
    head_dim = fields.integer("head_dim", minimum=2, default=hidden_size // num_heads)
    if head_dim % 2:
        raise fields.error("head_dim", f"{head_dim} is odd; rotary embedding turns pairs")
    return head_dim


def _rope(fields: _Fields) -> RopeConfig:
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
    rope = _Fields(fields.path, {"rope_theta": fields.get("rope_theta"), **raw}, prefix=f"{section}.")
    for owner in (rope, fields):
        if owner.number("partial_rotary_factor", minimum=0.0, default=1.0) != 1.0:
            raise owner.error("partial_rotary_factor", "only 1 is supported")
    theta = rope.number("rope_theta", minimum=1.0)
    if scaling == "none":
        return RopeConfig(theta)
    factor = rope.number("factor", minimum=1.0)
    if scaling == "linear":
        return RopeConfig(theta, scaling, factor)
    low, high = rope.number("low_freq_factor", minimum=0.0), rope.number("high_freq_factor", minimum=0.0)
    if not 0 < low < high:
        raise rope.error("low_freq_factor", f"{low} is not above 0 and below high_freq_factor {high}")
    original = rope.integer("original_max_position_embeddings", minimum=1)
    return RopeConfig(theta, scaling, factor, low, high, original)


def _dtype(fields: _Fields) -> DType:
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value: DType = fields.get(name) or "float32"
    if value not in get_args(DType):
        raise fields.error(name, f"{value!r} is not supported; supported: {', '.join(get_args(DType))}")
    return value


def _check_consistent(fields: _Fields, config: ModelConfig) -> None:
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


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed access to the fields of a JSON object; every failure names the file and the field.  null is absent."""

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""

    def error(self, name: str, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.prefix}{name}: {message}", param=self.path.name)

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def integer(self, name: str, *, minimum: int, default: int | None = None) -> int:
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(name, f"expected an integer of at least {minimum}, found {value!r}")
        return value

    def number(self, name: str, *, minimum: float, default: float | None = None) -> float:
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value < math.inf:
            raise self.error(name, f"expected a number of at least {minimum}, found {value!r}")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._present(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"expected true or false, found {value!r}")
        return value

    def optional_integer(self, name: str) -> int | None:
        return None if self.get(name) is None else self.integer(name, minimum=0)

    def optional_number(self, name: str) -> float | None:
        return None if self.get(name) is None else self.number(name, minimum=0.0)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """An id or a list of ids."""
        value = self.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.error(name, f"expected a token id or a list of them, found {value!r}")
        return tuple(ids)

    def _present(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "missing")
        return value
