"""What a checkpoint says about its model: `config.json` and `generation_config.json`, read strictly.

The table of families says what a family's keys mean.  A key that the family's row does not know, or a value that no
backend implements, is refused by name, because a model that answers wrongly is worse than one that does not load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from shoal.model.architecture import Activation, DType, LayerConfig, MixtureConfig, ModelConfig
from shoal.model.checkpoint.families import FAMILIES, Family, Mixture, Tensors
from shoal.model.checkpoint.families.family import CHUNKED, SLIDING, resolve
from shoal.model.checkpoint.families.refused import HARMLESS, INACTIVE, REFUSED
from shoal.model.checkpoint.families.rope import read_rope
from shoal.model.checkpoint.format import CheckpointFormat, open_checkpoint
from shoal.model.checkpoint.parts import Fields
from shoal.scheduler.errors import CheckpointError

_MAX_LAYERS = 10_000
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "clamped_silu": "clamped_silu",
}


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
        CheckpointError: naming the file and the field that is missing, malformed, inconsistent, unknown or unsupported.
    """
    return read_config(open_checkpoint(checkpoint).config())[0]


def read_config(fields: Fields) -> tuple[ModelConfig, Tensors]:
    """The architecture that the fields of a `config.json` describe, and how the tensors are stored.

    Raises:
        CheckpointError: see `load_config`.
    """
    name, family = _family(fields)
    fields, keys = _by_llamas_names(fields, family)
    config = _config(name, family, fields)
    tensors = family.tensors.resolve(fields)
    _refuse_unknown(fields, family, keys)
    return config, tensors


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


def _family(fields: Fields) -> tuple[str, Family]:
    name = fields.get("model_type")
    if not isinstance(name, str):
        raise fields.error("model_type", f"expected the name of a family, found {name!r}")
    if name in REFUSED:
        raise fields.error("model_type", f"{name!r} is not supported: {REFUSED[name]}")
    if name not in FAMILIES:
        raise fields.error(
            "model_type", f"{name!r} is not supported; docs/models.md lists the {len(FAMILIES)} that are"
        )
    return name, FAMILIES[name]


class _Read(dict[str, Any]):
    """A dictionary that keeps the keys that were asked for."""

    def __init__(self, values: Mapping[str, Any], given: set[str]) -> None:
        super().__init__(values)
        self.given = given
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


def _by_llamas_names(fields: Fields, family: Family) -> tuple[Fields, _Read]:
    """The fields by Llama's names, with the family's defaults."""
    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    nested = fields.get(family.nested) if family.nested else None
    inner = {f"{family.nested}.{key}": value for key, value in nested.items()} if isinstance(nested, dict) else {}
    for key, value in {**fields.values, **inner}.items():
        name = family.keys.get(key, key)
        if value is not None and values.get(name) not in (None, value):
            raise fields.error(key, f"{value!r} differs from {names.get(name, name)} {values[name]!r}")
        if value is not None or name not in values:
            values[name] = value
            names[name] = fields.names.get(key, key)
    given = set(values)
    values = {**{name: value for name, value in family.defaults.items() if not callable(value)}, **values}
    read = _Read(values, given)
    own = {name: key for key, name in family.keys.items()}
    fields = Fields(fields.path, read, names={**own, **fields.names, **names})
    for name, source in family.defaults.items():
        if callable(source) and read.get(name) is None:
            read[name] = source(fields)
    return fields, read


def _refuse_unknown(fields: Fields, family: Family, keys: _Read) -> None:
    for key, supported in family.only.items():
        value = fields.get(key)
        if any(one not in (None, *supported) for one in (value if isinstance(value, list) else [value])):
            values = ", ".join(map(json.dumps, supported or (None,)))
            raise fields.error(key, f"{json.dumps(value)[:80]} is not supported; supported: {values}")
    if fields.get("quantization_config") is not None:
        raise fields.error("quantization_config", "quantized checkpoints are not supported")
    known = keys.asked | set(family.ignored) | {family.nested}
    for key in sorted(keys.given - known):
        value, last = keys[key], key.rpartition(".")[2]
        if value is not None and last not in HARMLESS and (last not in INACTIVE or value != INACTIVE[last]):
            raise fields.error(key, f"unknown for the family {fields.get('model_type')}, or not supported")


def _config(name: str, family: Family, fields: Fields) -> ModelConfig:
    """The architecture: Llama's sources, and over them those of the family."""
    hidden_size = fields.integer("hidden_size", minimum=1)
    num_heads = fields.integer("num_attention_heads", minimum=1)
    latent = family.latent(fields) if family.latent else None
    head_dim = latent.nope_dim + latent.rope_dim if latent else _head_dim(fields, hidden_size, num_heads)
    sources: dict[str, Any] = {
        "architecture": _architecture(fields),
        "family": name,
        "vocab_size": fields.integer("vocab_size", minimum=1),
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": fields.integer("num_key_value_heads", minimum=1, default=num_heads),
        "head_dim": head_dim,
        "layers": _layers(family, fields, latent.rope_dim if latent else head_dim),
        "norm_eps": fields.number("rms_norm_eps", minimum=0.0),
        "attention_scale": None,
        "max_position_embeddings": fields.integer("max_position_embeddings", minimum=1),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", default=False),
        "dtype": _dtype(fields),
        "bos_token_id": next(iter(_known_tokens(fields, "bos_token_id")), None),
        "eos_token_ids": _known_tokens(fields, "eos_token_id"),
        "latent": latent,
        "activation": _activation,
        **family.fields,
    }
    values = {field: resolve(source, fields) for field, source in sources.items()}
    if values["attention_scale"] is None:
        values["attention_scale"] = head_dim**-0.5
    if values["num_kv_heads"] is None:
        values["num_kv_heads"] = num_heads
    config = ModelConfig(**values)
    if config.qk_norm != "none" and not config.qk_norm_eps:
        config = replace(config, qk_norm_eps=config.norm_eps)
    _check_consistent(fields, config)
    return config


def _architecture(fields: Fields) -> str:
    names = fields.get("architectures")
    if names is None:
        return ""
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise fields.error("architectures", f"expected a list of one name, found {names!r}")
    return names[0]


def _activation(fields: Fields) -> Activation:
    name = fields.get("hidden_act")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise fields.error("hidden_act", f"{name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    if fields.get("head_dim") is None and hidden_size % num_heads:
        raise fields.error(
            "hidden_size", f"{hidden_size} is not a multiple of {fields.own_name('num_attention_heads')} {num_heads}"
        )
    return fields.integer("head_dim", minimum=1, default=hidden_size // num_heads)


def _layers(family: Family, fields: Fields, head_dim: int) -> tuple[LayerConfig, ...]:
    count = fields.integer("num_hidden_layers", minimum=1)
    if count > _MAX_LAYERS:
        raise fields.error("num_hidden_layers", f"{count} exceeds {_MAX_LAYERS}")
    kinds = family.kinds(fields, count)
    rotates = family.rotates(fields, kinds) if family.rotates else [False] * count
    rotary_dim = resolve(family.rotary_dim, fields)
    turning = [kind for kind, turns in zip(kinds, rotates, strict=True) if turns]
    ropes = {
        kind: read_rope(fields, kind, head_dim, rotary_dim, local=family.local_rope) for kind in dict.fromkeys(turning)
    }
    mixed = family.mixture.layers(fields, count) if family.mixture else [False] * count
    mixture = _mixture(family.mixture, fields, any(mixed)) if family.mixture else None
    fields.get("intermediate_size")  # some files have it although all layers have a mixture
    width = resolve(family.dense_width, fields) if not all(mixed) else 0
    window = _span(fields, "sliding_window") if SLIDING in kinds else 0
    chunk = _span(fields, "attention_chunk_size") if CHUNKED in kinds else 0
    return tuple(
        LayerConfig(
            rope=ropes[kind] if turns else None,
            intermediate_size=0 if has_mixture else width,
            window=window if kind == SLIDING else 0,
            chunk=chunk if kind == CHUNKED else 0,
            temperature=family.temperature(fields, turns) if family.temperature else None,
            mixture=mixture if has_mixture else None,
        )
        for kind, turns, has_mixture in zip(kinds, rotates, mixed, strict=True)
    )


def _span(fields: Fields, name: str) -> int:
    """A window or chunk; 0 if no sequence gets beyond it."""
    span = fields.integer(name, minimum=1)
    return span if span < fields.integer("max_position_embeddings", minimum=1) else 0


def _mixture(family: Mixture, fields: Fields, is_used: bool) -> MixtureConfig | None:
    sources = {
        "num_experts": lambda fields: fields.integer("num_local_experts", minimum=1),
        "num_experts_per_tok": lambda fields: fields.integer("num_experts_per_tok", minimum=1),
        **family.fields,
    }
    if not is_used:
        for source in sources.values():
            with suppress(CheckpointError):
                resolve(source, fields)  # so that its keys count as known
        return None
    mixture = MixtureConfig(**{name: resolve(source, fields) for name, source in sources.items()})
    if mixture.num_experts_per_tok > mixture.num_experts:
        wrong = f"{mixture.num_experts_per_tok} exceeds {fields.own_name('num_local_experts')} {mixture.num_experts}"
        raise fields.error("num_experts_per_tok", wrong)
    if mixture.num_experts % mixture.num_groups:
        raise fields.error(
            "n_group", f"{mixture.num_experts} experts are not a multiple of {mixture.num_groups} groups"
        )
    if not 1 <= mixture.num_chosen_groups <= mixture.num_groups:
        raise fields.error("topk_group", f"{mixture.num_chosen_groups} exceeds n_group {mixture.num_groups}")
    size = mixture.num_experts // mixture.num_groups
    if mixture.num_experts_per_tok > size * mixture.num_chosen_groups:
        chosen = f"{mixture.num_chosen_groups} groups of {size} experts"
        raise fields.error("num_experts_per_tok", f"{mixture.num_experts_per_tok} exceeds {chosen}")
    return mixture


def _dtype(fields: Fields) -> DType:
    new, old = fields.get("dtype"), fields.get("torch_dtype")
    value: DType = new or old or "float32"
    if value not in get_args(DType):
        supported = ", ".join(get_args(DType))
        raise fields.error("dtype" if new else "torch_dtype", f"{value!r} is not supported; supported: {supported}")
    return value


def _known_tokens(fields: Fields, name: str) -> tuple[int, ...]:
    """The ids within the vocabulary: some files name others, which no model can give."""
    vocab_size = fields.integer("vocab_size", minimum=1)
    return tuple(token for token in fields.token_ids(name) if token < vocab_size)


def _check_consistent(fields: Fields, config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise fields.error(
            "num_attention_heads",
            f"{config.num_heads} is not a multiple of {fields.own_name('num_key_value_heads')} {config.num_kv_heads}",
        )
