"""RoPE of a `config.json`: every scaling becomes divisors of the frequencies and a factor on cos and sin."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.model.architecture import RopeConfig
from shoal.model.checkpoint.families.family import SLIDING
from shoal.model.checkpoint.parts import Fields

_COMMON = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_YARN = {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"}
# The keys of each scaling beside the common ones, of which some change nothing.
_KEYS: dict[str, set[str]] = {
    "default": {"original_max_position_embeddings"},
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings", "alpha", "beta_fast", "beta_slow", "mscale"}
    | {"mscale_all_dim"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": _YARN | {"mscale", "mscale_all_dim", "max_position_embeddings", "llama_4_scaling_beta"},
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
    "factors": {"factors"},
}
_MOST_ELEMENTS = 2**16
_OTHER_NAMES = {"su": "longrope"}


def read_rope(fields: Fields, kind: str, head_dim: int, rotary_dim: int | None, *, local: bool) -> RopeConfig:
    """The rotary embedding of layers of a kind of attention.

    Args:
        rotary_dim: elements of a head that turn; None where a factor says so.
        local: whether layers with a window have their own one, without the scaling.

    It stands in `rope_parameters` (transformers 5), which may hold an object for each kind, or in `rope_theta`,
    `rope_scaling` and `rope_local_base_freq` (before).

    Raises:
        CheckpointError: naming the field that is missing, malformed, unknown or not supported.
    """
    rope = _section(fields, kind, local)
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    scaling = _OTHER_NAMES.get(scaling, scaling) if isinstance(scaling, str) else scaling
    if not isinstance(scaling, str) or scaling not in _SCALINGS:
        supported = ", ".join(name for name in _SCALINGS if name != "factors")
        raise rope.error("rope_type", f"{scaling!r} is not supported; supported: {supported}")
    if unknown := [key for key in rope.values if key not in _COMMON | _KEYS[scaling] and rope.get(key) is not None]:
        raise rope.error(unknown[0], f"unknown for rope type {scaling!r}")
    theta = rope.number("rope_theta", minimum=1.0)
    if theta == 1.0:
        raise rope.error("rope_theta", "expected a number above 1, found 1")
    dim = int(head_dim * rope.number("partial_rotary_factor", minimum=0.0, default=1.0))
    dim = dim if rotary_dim is None else rotary_dim
    if not 2 <= dim <= min(head_dim, _MOST_ELEMENTS) or dim % 2:
        raise fields.error("head_dim", f"{dim} of {head_dim} elements of a head turn; expected an even number of them")
    frequencies = theta ** (-np.arange(0, dim, 2) / dim)
    with np.errstate(all="ignore"):
        factors, attention_factor = _SCALINGS[scaling](fields, rope, frequencies)
    if not all(0 < factor < math.inf for factor in (*factors, attention_factor)):
        raise rope.error("rope_type", f"{scaling!r} with these numbers gives frequencies of zero or infinity")
    config = RopeConfig(theta, dim, scaling, tuple(float(factor) for factor in factors), float(attention_factor))
    if scaling != "longrope":
        return config
    short = _numbers(rope, "short_factor", len(frequencies))
    return replace(config, short_factors=tuple(map(float, short)), short_length=_original_length(fields, rope))


def _section(fields: Fields, kind: str, local: bool) -> Fields:
    """The keys of the rotary embedding, from wherever the file has them."""
    outer = {name: fields.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    local_theta, old = fields.get("rope_local_base_freq"), fields.get("rope_scaling")  # read even if they do not count
    new, _ = fields.get("rope_parameters"), fields.get("original_max_position_embeddings")
    name, found = ("rope_scaling", old) if new is None else ("rope_parameters", new)
    section: Any = {} if found is None else found
    if isinstance(section, dict) and any(isinstance(value, dict) for value in section.values()):
        name, section = f"{name}.{kind}", section.get(kind)
    elif local and kind == SLIDING:
        return fields.section(name, outer if local_theta is None else {**outer, "rope_theta": local_theta})
    if not isinstance(section, dict):
        raise fields.error(name, f"expected an object, found {section!r}")
    return fields.section(name, {**outer, **{key: value for key, value in section.items() if value is not None}})


Factors = tuple[NDArray[np.float64] | list[float], float]
"""The divisors of the frequencies, empty for none, and the factor on cos and sin."""


def _default(fields: Fields, rope: Fields, frequencies: NDArray[np.float64]) -> Factors:
    return [], 1.0


def _dynamic(fields: Fields, rope: Fields, frequencies: NDArray[np.float64]) -> Factors:
    """It scales only beyond max_position_embeddings, where no sequence gets; with `alpha` (Hunyuan) always."""
    alpha, dim = rope.optional_number("alpha"), 2 * len(frequencies)
    if not alpha or dim == 2:
        return [], 1.0
    return np.power(alpha, 2 * np.arange(len(frequencies)) / (dim - 2)), 1.0


def _linear(fields: Fields, rope: Fields, frequencies: NDArray[np.float64]) -> Factors:
    return np.full(len(frequencies), rope.number("factor", minimum=1.0)), 1.0


def _llama3(fields: Fields, rope: Fields, frequencies: NDArray[np.float64]) -> Factors:
    """The share of the unscaled frequency rises from 0 to 1 with the turns made within the original length."""
    factor = rope.number("factor", minimum=1.0)
    low, high = rope.number("low_freq_factor", minimum=0.0), rope.number("high_freq_factor", minimum=0.0)
    if not 0 < low < high:
        raise rope.error("low_freq_factor", f"{low} is not above 0 and below high_freq_factor {high}")
    turns = _original_length(fields, rope) * frequencies / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / (share + (1 - share) / factor), 1.0


def _yarn(fields: Fields, rope: Fields, frequencies: NDArray[np.float64]) -> Factors:
    """YaRN (Peng et al. 2023): slow pairs are interpolated, fast ones are not, with a ramp between them."""
    original = _original_length(fields, rope)
    longest = fields.integer("max_position_embeddings", minimum=1)
    factor = rope.number("factor", minimum=1.0, default=longest / original)
    theta, dim = rope.number("rope_theta", minimum=1.0), 2 * len(frequencies)

    def pair(turns: float) -> float:
        """The pair that makes this number of turns within the original length."""
        ratio = max(original / (turns * 2 * math.pi), sys.float_info.min)
        return dim * math.log(ratio) / (2 * math.log(theta))

    low = pair(rope.number("beta_fast", minimum=0.0, default=0.0) or 32.0)
    high = pair(rope.number("beta_slow", minimum=0.0, default=0.0) or 1.0)
    if rope.flag("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    interpolated = np.clip((np.arange(len(frequencies)) - low) / (high - low), 0.0, 1.0)
    stated = rope.optional_number("attention_factor")
    one, all_dims = rope.optional_number("mscale"), rope.optional_number("mscale_all_dim")
    derived = yarn_magnitude(factor, 1.0)
    if one and all_dims:
        derived = yarn_magnitude(factor, one) / yarn_magnitude(factor, all_dims)
    return 1 / (interpolated / factor + 1 - interpolated), derived if stated is None else stated


def yarn_magnitude(factor: float, scale: float) -> float:
    """What YaRN multiplies cos and sin by, for a factor of lengths."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(fields: Fields, rope: Fields, frequencies: NDArray[np.float64]) -> Factors:
    """LongRoPE (Ding et al. 2024), with the long factors wherever sequences may exceed the original length.

    Transformers takes the short factors until a sequence exceeds it, and so another number for a token's key
    depending on what comes after it.  `RopeConfig.within` takes them if no sequence can exceed it.
    """
    longest, original = fields.integer("max_position_embeddings", minimum=1), _original_length(fields, rope)
    factor = rope.number("factor", minimum=0.0, default=longest / original)
    stated = rope.optional_number("attention_factor")
    derived = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    name = "long_factor" if longest > original else "short_factor"
    return _numbers(rope, name, len(frequencies)), derived if stated is None else stated


def _factors(fields: Fields, rope: Fields, frequencies: NDArray[np.float64]) -> Factors:
    return _numbers(rope, "factors", len(frequencies)), 1.0


def _original_length(fields: Fields, rope: Fields) -> int:
    """Phi-3 has the length beside its scaling, and that one counts."""
    name, longest = "original_max_position_embeddings", fields.integer("max_position_embeddings", minimum=1)
    owner = rope if fields.get(name) is None else fields
    return owner.integer(name, minimum=2, default=longest)


def _numbers(rope: Fields, name: str, count: int) -> list[float]:
    numbers: Any = rope.get(name)
    if not isinstance(numbers, list) or len(numbers) != count:
        found = f"{len(numbers)}" if isinstance(numbers, list) else f"{numbers!r}"
        raise rope.error(name, f"expected {count} numbers, found {found}")
    if not all(isinstance(number, int | float) and 0 < number < math.inf for number in numbers):
        raise rope.error(name, "not all are above 0 and finite")
    return numbers


_SCALINGS: dict[str, Callable[[Fields, Fields, NDArray[np.float64]], Factors]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "factors": _factors,  # of GGUF files
}
