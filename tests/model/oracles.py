"""Shapes of models, texts and oracles of the logits, which the tests of all backends share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from shoal.model.record import Attention, Experts, FeedForward, Layer, ModelConfig, ModelRecord, RopeConfig
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


def random_record(seed: int = 0, **shape: Any) -> ModelRecord:
    """A model of random weights, which keep the size of what goes through them; see `ModelConfig` for the shape."""
    defaults: dict[str, Any] = {
        "architecture": "random",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "num_experts": 0,
        "num_experts_per_tok": 0,
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig(10_000.0),
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_ids": (),
    }
    config = ModelConfig(**(defaults | shape))
    rng = np.random.default_rng(seed)

    def weights(size: int, depth: int) -> np.ndarray:
        return rng.standard_normal((size, depth), np.float32) * np.float32(1.5 / np.sqrt(depth))

    def gain() -> np.ndarray:
        return rng.uniform(0.5, 1.5, config.hidden_size).astype(np.float32)

    def feed_forward() -> FeedForward:
        hidden, width = config.hidden_size, config.intermediate_size
        return FeedForward(weights(width, hidden), weights(width, hidden), weights(hidden, width))

    def layer() -> Layer:
        hidden, size = config.hidden_size, config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        q, k, v = weights(size, hidden), weights(kv_size, hidden), weights(kv_size, hidden)
        attention = Attention(q, k, v, weights(hidden, size))
        if not config.num_experts:
            return Layer(gain(), attention, gain(), feed_forward())
        experts = tuple(feed_forward() for _ in range(config.num_experts))
        return Layer(gain(), attention, gain(), Experts(weights(config.num_experts, hidden), experts))

    embedding = weights(config.vocab_size, config.hidden_size)
    head = embedding if config.tie_word_embeddings else weights(config.vocab_size, config.hidden_size)
    layers = tuple(layer() for _ in range(config.num_layers))
    return ModelRecord(config, embedding, layers, gain(), head)
