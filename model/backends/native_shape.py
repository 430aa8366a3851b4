"""A model's architecture as the C++ takes it: see ShoalShape in model/native/shoal.h."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from shoal.model.architecture import LayerConfig, MixtureConfig, ModelConfig, Temperature
from shoal.model.backends.native_library import (
    ACTIVATIONS,
    HEAD_NORMS,
    MAX_EXPERTS,
    MAX_HEAD_DIM,
    MAX_LATENT,
    NORMS,
    SCORES,
    Latent,
    Layer,
    Mixture,
    Rope,
    Shape,
    address,
)
from shoal.model.backends.rope import rope_tables
from shoal.model.step.batch import Float32
from shoal.scheduler.errors import ConfigError

_FLOAT32 = np.dtype(np.float32)


def find_obstacle(config: ModelConfig) -> tuple[str, str] | None:
    """The field that the native code is not made for, and what is wrong with it; None if it can serve the model."""
    num_experts = max((layer.mixture.num_experts for layer in config.layers if layer.mixture), default=0)
    latent_width = config.latent.rank + config.latent.rope_dim if config.latent else 0
    for name, value, limit in (
        ("head_dim", 0 if config.latent else config.head_dim, MAX_HEAD_DIM),
        ("rank", latent_width, MAX_LATENT),
        ("num_experts", num_experts, MAX_EXPERTS),
    ):
        if value > limit:
            return name, f"the model's {name} {value} exceeds the {limit} that the native backend is made for"
    return _latent_obstacle(config) if config.latent else None


def _latent_obstacle(config: ModelConfig) -> tuple[str, str] | None:
    """What no family has beside latent attention."""
    others = {
        "window": any(layer.window for layer in config.layers),
        "chunk": any(layer.chunk for layer in config.layers),
        "qk_norm": config.qk_norm != "none",
        "attention_softcap": config.attention_softcap > 0,
        "alibi_slopes": bool(config.alibi_slopes),
    }
    found = next((name for name, is_there in others.items() if is_there), None)
    return (found, f"the native backend has no {found} with latent attention") if found else None


def check_cache(config: ModelConfig, kv_cache_dtype: str) -> None:
    """
    Raises:
        ConfigError: the native code has no such cache for the model.
    """
    if config.latent and kv_cache_dtype == "int8":
        raise ConfigError("kv_cache_dtype int8 is not for latent attention", param="kv_cache_dtype")


@dataclass
class NativeShape:
    """The shape of a model, and the arrays that it points to.

    Args:
        num_positions: that a sequence may have.
        is_tied: whether the head is the embedding.
    """

    config: ModelConfig
    num_positions: int
    is_tied: bool
    shape: Shape = field(init=False)
    _arrays: list[Any] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        config = self.config
        ropes = list(dict.fromkeys(layer.rope for layer in config.layers if layer.rope))
        temperatures = list(dict.fromkeys(layer.temperature for layer in config.layers if layer.temperature))
        named = {
            "norm": NORMS.index(config.norm),
            "activation": ACTIVATIONS.index(config.activation),
            "qk_norm": HEAD_NORMS.index(config.qk_norm),
            "qk_norm_kind": NORMS.index(config.qk_norm_kind),
            "attention_scale": _attention_scale(config),
        }
        own: dict[str, Any] = {
            "num_groups": len(config.cache_groups),
            "tie_word_embeddings": self.is_tied,
            "num_positions": self.num_positions,
            "num_ropes": len(ropes),
            "num_temperatures": len(temperatures),
            "layers": (Layer * config.num_layers)(
                *(
                    _layer(layer, place, _index(ropes, layer.rope), _index(temperatures, layer.temperature))
                    for layer, place in zip(config.layers, config.cache_places, strict=True)
                )
            ),
            "ropes": (Rope * len(ropes))(
                *(Rope(rope.dim, *map(self._keep, rope_tables(rope, self.num_positions))) for rope in ropes)
            ),
            "temperatures": self._keep(_factors(temperatures, self.num_positions)),
            "latent": Latent(**asdict(config.latent)) if config.latent else Latent(),
            "alibi_slopes": self._keep(np.array(config.alibi_slopes, np.float32)) if config.alibi_slopes else None,
        }
        others = [name for name, *_ in Shape._fields_ if name not in named and name not in own]
        self.shape = Shape(**named, **own, **{name: getattr(config, name) for name in others})

    def _keep(self, array: Float32) -> int:
        """Where the numbers of an array are, as long as this object lives."""
        self._arrays.append(array)
        return address(array, _FLOAT32)


def _index(of: list[Any], one: Any) -> int:
    return of.index(one) if one else -1


def _layer(layer: LayerConfig, place: tuple[int, int], rope: int, temperatures: int) -> Layer:
    mixture = _mixture(layer.mixture) if layer.mixture else Mixture()
    return Layer(rope, temperatures, layer.window, layer.chunk, *place, layer.intermediate_size, mixture)


def _mixture(config: MixtureConfig) -> Mixture:
    own = {"score": SCORES.index(config.score), "sums_top2": config.group_score == "top2"}
    return Mixture(**own, **{name: getattr(config, name) for name, *_ in Mixture._fields_ if name not in own})


def _factors(temperatures: list[Temperature], num_positions: int) -> Float32:
    """The factors of the queries by position, [len(temperatures), num_positions]."""
    factors = np.empty((len(temperatures), num_positions), np.float32)
    for index, temperature in enumerate(temperatures):
        periods = (np.arange(num_positions) + temperature.offset) // temperature.length
        factors[index] = 1 + temperature.scale * np.log1p(periods)
    return factors


def _attention_scale(config: ModelConfig) -> float:
    """The scale of the scores as float32.

    The usual one is the quotient of two float32: it may differ in its last bit from what a checkpoint states.
    """
    usual = np.float32(1) / np.sqrt(np.float32(config.head_dim))
    return float(usual) if math.isclose(config.attention_scale, usual, rel_tol=2**-22) else config.attention_scale
