"""What is trained, and how: the sizes of a network and the settings of its training, read from a TOML file."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from shoal.scheduler.errors import ConfigError

_NUMBERS: dict[str, Any] = {"echo_tokens": int, "acceptance_from": float, "num_unrolled": int}
Section = TypeVar("Section", "NetworkConfig", "TrainingConfig")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """The architecture: Mixtral's with `num_experts` > 0, Llama's with 0.

    Attributes:
        tie_word_embeddings: whether the head is the embedding.
        intermediate_size: width of the feed-forward network, or of each expert.
        max_position_embeddings: longest context that the exported model claims.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
                param="num_kv_heads",
            )
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be 1 to num_experts ({self.num_experts})",
                param="num_experts_per_tok",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How the network is trained.

    Attributes:
        batch_size: sequences a step, each of `sequence_length` tokens.
        short_length: tokens of the pieces that sequences are cut into at first, because attention over a short
            piece is cheap; a divisor of `sequence_length`.
        lengthen_from: share of the budget after which sequences stay whole.
        decay_from: share of the budget after which the learning rate falls linearly to zero.
        balance_coefficient: weight of the load-balancing loss beside the cross-entropy.
    """

    seed: int
    batch_size: int
    sequence_length: int
    short_length: int
    lengthen_from: float
    learning_rate: float
    warmup_steps: int
    decay_from: float
    weight_decay: float
    max_gradient_norm: float
    balance_coefficient: float

    def __post_init__(self) -> None:
        if self.short_length < 1 or self.sequence_length % self.short_length:
            raise ConfigError(
                f"short_length ({self.short_length}) must divide sequence_length ({self.sequence_length})",
                param="short_length",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A model to train, by name.

    Attributes:
        teacher: the recipe of the target that a draft model is distilled from; None trains on the text itself.
        echo_tokens: tokens that the target writes for its draft; the draft reads half as many of the corpus.
        acceptance_from: share of the budget after which a draft is trained for acceptance by its target; before, it
            is trained to match the target's distribution.
        num_unrolled: 0 for a model; for a module of multi-token prediction, how many tokens it predicts in training.
    """

    name: str
    network: NetworkConfig
    training: TrainingConfig
    teacher: Recipe | None = None
    echo_tokens: int = 0
    acceptance_from: float = 1.0
    num_unrolled: int = 0

    def __post_init__(self) -> None:
        if self.num_unrolled and (self.teacher is None or self.network.tie_word_embeddings):
            raise ConfigError(f"{self.name} needs a teacher, and a head of its own", param="num_unrolled")
        if self.teacher and self.teacher.network.vocab_size != self.network.vocab_size:
            raise ConfigError(
                f"the draft {self.name} has vocab_size {self.network.vocab_size}, "
                f"its target {self.teacher.name} has {self.teacher.network.vocab_size}",
                param="vocab_size",
            )


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to train: a limit on tokens or on seconds of training, one of which is set."""

    tokens: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `45min`, `2h` or `20Mtok`; anything else is a ConfigError."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(min|h|Mtok)", text)
        if match is None or float(match[1]) == 0:
            raise ConfigError(f"budget {text!r} is not like 45min, 2h or 20Mtok", param="budget")
        amount = float(match[1])
        if match[2] == "Mtok":
            return cls(tokens=round(amount * 1e6))
        return cls(seconds=amount * {"min": 60, "h": 3600}[match[2]])

    def spent(self, tokens: int, seconds: float) -> float:
        """The share of the budget that is used up, 0 to 1."""
        if self.tokens is not None:
            return min(1.0, tokens / self.tokens)
        assert self.seconds is not None
        return min(1.0, seconds / self.seconds)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe, and its teacher's beside it; ConfigError that names a missing, unknown or wrongly typed key."""
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}", param=path.name) from error
    unknown = table.keys() - {"name", "teacher", "network", "training", *_NUMBERS}
    if unknown:
        raise ConfigError(f"{path}: unknown key {min(unknown)!r}", param=min(unknown))
    return Recipe(
        name=str(table.get("name", path.stem)),
        network=_section(NetworkConfig, table.get("network", {}), f"{path} [network]"),
        training=_section(TrainingConfig, table.get("training", {}), f"{path} [training]"),
        teacher=load_recipe(path.parent / str(table["teacher"])) if "teacher" in table else None,
        **{name: kind(table[name]) for name, kind in _NUMBERS.items() if name in table},
    )


def _section(kind: type[Section], table: dict[str, Any], where: str) -> Section:
    types: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "bool": bool}
    expected = {field.name: types[str(field.type)] for field in fields(kind)}
    for name in sorted(expected.keys() ^ table.keys()):
        problem = "missing" if name in expected else "unknown"
        raise ConfigError(f"{where}: {problem} key {name!r}", param=name)
    for name, value in table.items():
        if not isinstance(value, expected[name]) or (isinstance(value, bool) and expected[name] is not bool):
            raise ConfigError(f"{where}: {name} = {value!r} is of the wrong type", param=name)
    return kind(**table)
