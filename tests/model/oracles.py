"""Shapes of models, texts and oracles of the logits, which the tests of all backends share."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from shoal.model.architecture import LatentConfig, LayerConfig, MixtureConfig, ModelConfig, RopeConfig
from shoal.model.numbers import Array
from shoal.model.prediction import Prediction
from shoal.model.record import (
    Attention,
    Experts,
    FeedForward,
    LatentAttention,
    Layer,
    Linear,
    ModelRecord,
    Norm,
)
from shoal.model.step.batch import Backend

BUNDLED = Path(__file__).parents[2] / "model/bundled/shoal-moe"

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-one-kv-head": {"num_key_value_heads": 1},
    "llama-no-groups": {"num_key_value_heads": 4},
    "llama-wide-heads": {"head_dim": 24, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
    "llama-linear-rope": {"rope_parameters": LINEAR_ROPE},
    "llama-llama3-rope": {"rope_parameters": LLAMA3_ROPE, "head_dim": 32},
    "llama-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}, "rms_norm_eps": 1e-3},
    "mixtral": {},
    "mixtral-tied": {"tie_word_embeddings": True, "head_dim": 16},
    "mixtral-one-of-three": {"num_local_experts": 3, "num_experts_per_tok": 1},
    "mixtral-all-of-eight": {"num_local_experts": 8, "num_experts_per_tok": 8, "num_key_value_heads": 1},
    "mixtral-odd-width": {"intermediate_size": 20, "hidden_size": 40, "num_local_experts": 5, "num_experts_per_tok": 3},
    "mixtral-llama3-rope": {"rope_parameters": LLAMA3_ROPE},
}

# For `random_record`: SmolLM2-135M with fewer layers and a smaller vocabulary.
SMOLLM2 = {"hidden_size": 576, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "intermediate_size": 1536}

# What the record of a model has, or lacks, that no field of its configuration says.
PARTS = frozenset(
    [
        "qkv_bias",
        "output_bias",
        "feed_forward_bias",
        "router_bias",
        "expert_bias",
        "head_bias",
        "norm_bias",
        "no_gain",
        "output_norms",
        "only_output_norms",
        "shared_norm",
        "no_last_norm",
        "embedding_norm",
        "positions",
        "sinks",
        "correction",
        "shared_gate",
    ]
)

_SMALL: dict[str, Any] = {
    "architecture": "random",
    "family": "random",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "dtype": "float32",
    "bos_token_id": None,
    "eos_token_ids": (),
}


def sequences(seed: int, *lengths: int) -> dict[str, list[int]]:
    rng = np.random.default_rng(seed)
    return {f"sequence-{i}": rng.integers(0, 96, n).tolist() for i, n in enumerate(lengths)}


def run_chunks(
    backend: Backend, pages: Any, texts: dict[str, list[int]], steps: list[dict[str, int]]
) -> dict[str, np.ndarray]:
    """Feed each sequence the given number of tokens in each step; give all logits by sequence."""
    done = dict.fromkeys(texts, 0)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in texts}
    for step in steps:
        parts = [(name, texts[name][done[name] : done[name] + n], done[name]) for name, n in step.items()]
        logits = backend.forward(pages.batch(parts))
        for name, tokens, _ in parts:
            rows[name].append(logits[: len(tokens)])
            logits = logits[len(tokens) :]
            done[name] += len(tokens)
    assert all(done[name] == len(texts[name]) for name in texts)
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def run_whole(backend: Backend, pages: Any, tokens: list[int]) -> np.ndarray:
    """The logits of a sequence in one step of its own, whose blocks are then free again."""
    logits = run_chunks(backend, pages, {"whole": tokens}, [{"whole": len(tokens)}])["whole"]
    pages.release("whole")
    return logits


def random_steps(seed: int, texts: dict[str, list[int]]) -> list[dict[str, int]]:
    """Steps for `run_chunks` that feed all of the texts, some of them in each step, in any order."""
    rng = np.random.default_rng(seed)
    left = {name: len(tokens) for name, tokens in texts.items()}
    steps = []
    while any(left.values()):
        some = [str(name) for name in rng.permutation(list(texts)) if left[name] and rng.random() < 0.7]
        steps.append({name: min(left[name], int(rng.choice([1, 1, 2, 3, 5, 30, 65, 130]))) for name in some})
        left = {name: left[name] - steps[-1].get(name, 0) for name in texts}
    return [step for step in steps if step]


def random_config(*, num_layers: int = 2, rope_theta: float = 10_000.0, **fields: Any) -> ModelConfig:
    """The configuration of `random_record`."""
    given = _SMALL | fields
    latent, width = given.get("latent"), given.pop("intermediate_size")
    names = {field.name for field in dataclasses.fields(MixtureConfig)} - {"intermediate_size"}
    mixture = {name: given.pop(name) for name in names & given.keys()}
    layer: dict[str, Any] = {
        "rope": RopeConfig(rope_theta, latent.rope_dim if latent else given["head_dim"]),
        "mixture": MixtureConfig(intermediate_size=width, **mixture) if mixture.get("num_experts") else None,
    }
    layer |= {field.name: given.pop(field.name) for field in dataclasses.fields(LayerConfig) if field.name in given}
    layers = []
    for index in range(num_layers):
        own = {name: value[index % len(value)] if isinstance(value, list) else value for name, value in layer.items()}
        layers.append(LayerConfig(intermediate_size=0 if own["mixture"] else width, **own))
    head_dim = latent.nope_dim + latent.rope_dim if latent else given["head_dim"]
    return ModelConfig(**{"layers": tuple(layers), "attention_scale": head_dim**-0.5} | given)


def random_record(seed: int = 0, parts: Collection[str] = (), **fields: Any) -> ModelRecord:
    """A model of random weights, which keep the size of what goes through them.

    Args:
        parts: some of PARTS.
        fields: of `ModelConfig`, `LayerConfig` and `MixtureConfig`; `num_layers`; `rope_theta`.  A list for a field of
            `LayerConfig` has a value for each layer, and begins again at its end.
    """
    assert PARTS.issuperset(parts)
    return _RandomRecord(random_config(**fields), frozenset(parts), np.random.default_rng(seed)).record()


def random_prediction(target: ModelRecord, seed: int = 0, **fields: Any) -> Prediction:
    """A module of random weights for the target; it is narrower unless `fields` of its model say otherwise."""
    vocab_size, states = target.config.vocab_size, target.config.hidden_size
    model = random_record(seed, **{"num_layers": 1, "hidden_size": 24, "vocab_size": vocab_size} | fields)
    rng, hidden = np.random.default_rng(seed), model.config.hidden_size

    def weight(out: int, width: int) -> Linear:
        return Linear(rng.standard_normal((out, width), np.float32) * np.float32(1.5 / np.sqrt(width)))

    return Prediction(
        model,
        embedding=weight(vocab_size, 20).weight,
        token_norm=rng.uniform(0.5, 1.5, 20).astype(np.float32),
        state_norm=rng.uniform(0.5, 1.5, states).astype(np.float32),
        projection=weight(hidden, 20 + states),
        feedback=None if hidden == states else weight(states, hidden),
    )


@dataclasses.dataclass(frozen=True)
class _RandomRecord:
    """Draws the arrays of a model."""

    config: ModelConfig
    parts: frozenset[str]
    rng: np.random.Generator

    def record(self) -> ModelRecord:
        config, hidden = self.config, self.config.hidden_size
        embedding = self._weight(config.vocab_size, hidden)
        head = embedding if config.tie_word_embeddings else self._weight(config.vocab_size, hidden)
        return ModelRecord(
            config,
            embedding,
            tuple(self._layer(layer) for layer in config.layers),
            norm=None if "no_last_norm" in self.parts else self._norm(hidden),
            head=Linear(head, self._vector(config.vocab_size, "head_bias")),
            positions=self._weight(config.max_position_embeddings, hidden) if "positions" in self.parts else None,
            embedding_norm=self._norm(hidden) if "embedding_norm" in self.parts else None,
        )

    def _layer(self, layer: LayerConfig) -> Layer:
        hidden, mixture = self.config.hidden_size, layer.mixture
        only_after = self.config.norm_after_sum or "only_output_norms" in self.parts
        after = only_after or "output_norms" in self.parts
        return Layer(
            input_norm=None if only_after else self._norm(hidden),
            attention=self._latent_attention(self.config.latent) if self.config.latent else self._attention(),
            feed_forward_norm=None if only_after or "shared_norm" in self.parts else self._norm(hidden),
            feed_forward=self._experts(mixture) if mixture else self._feed_forward(layer.intermediate_size),
            attention_output_norm=self._norm(hidden) if after else None,
            feed_forward_output_norm=self._norm(hidden) if after else None,
        )

    def _attention(self) -> Attention:
        config, hidden = self.config, self.config.hidden_size
        size, kv_size = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        has_norms = config.qk_norm != "none"
        return Attention(
            q_proj=self._linear(size, hidden, "qkv_bias"),
            k_proj=self._linear(kv_size, hidden, "qkv_bias"),
            v_proj=self._linear(kv_size, hidden, "qkv_bias"),
            o_proj=self._linear(hidden, size, "output_bias"),
            q_norm=self._norm(size, config.qk_norm_kind) if has_norms else None,
            k_norm=self._norm(kv_size, config.qk_norm_kind) if has_norms else None,
            sinks=self._vector(config.num_heads, "sinks"),
        )

    def _latent_attention(self, latent: LatentConfig) -> LatentAttention:
        num_heads, hidden = self.config.num_heads, self.config.hidden_size
        return LatentAttention(
            q_down=self._linear(latent.query_rank, hidden, "qkv_bias") if latent.query_rank else None,
            q_down_norm=self._norm(latent.query_rank, "rms") if latent.query_rank else None,
            q_proj=self._linear(num_heads * (latent.nope_dim + latent.rope_dim), latent.query_rank or hidden),
            kv_down=self._linear(latent.rank + latent.rope_dim, hidden, "qkv_bias"),
            kv_norm=self._norm(latent.rank, "rms"),
            k_up=self._weight(num_heads, latent.nope_dim, latent.rank),
            v_up=self._weight(num_heads, latent.value_dim, latent.rank),
            o_proj=self._linear(hidden, num_heads * latent.value_dim, "output_bias"),
        )

    def _feed_forward(self, width: int, bias: str = "feed_forward_bias") -> FeedForward:
        hidden = self.config.hidden_size
        return FeedForward(
            gate_proj=self._linear(width, hidden, bias) if self.config.gated else None,
            up_proj=self._linear(width, hidden, bias),
            down_proj=self._linear(hidden, width, bias),
        )

    def _experts(self, mixture: MixtureConfig) -> Experts:
        hidden, num_experts = self.config.hidden_size, mixture.num_experts
        return Experts(
            router=self._linear(num_experts, hidden, "router_bias"),
            experts=tuple(self._feed_forward(mixture.intermediate_size, "expert_bias") for _ in range(num_experts)),
            correction=self._vector(num_experts, "correction"),
            shared=self._feed_forward(mixture.shared_size) if mixture.shared_size else None,
            shared_gate=self._linear(1, hidden) if "shared_gate" in self.parts else None,
        )

    def _weight(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape, np.float32) * np.float32(1.5 / np.sqrt(shape[-1]))

    def _vector(self, size: int, part: str) -> Array | None:
        return self.rng.normal(0, 0.3, size).astype(np.float32) if part in self.parts else None

    def _linear(self, out: int, depth: int, bias: str = "none") -> Linear:
        return Linear(self._weight(out, depth), self._vector(out, bias))

    def _norm(self, width: int, kind: str | None = None) -> Norm:
        gain = None if "no_gain" in self.parts else self.rng.uniform(0.5, 1.5, width).astype(np.float32)
        is_layer = (kind or self.config.norm) == "layer"
        return Norm(gain, self._vector(width, "norm_bias") if is_layer else None)
