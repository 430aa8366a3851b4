from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from model.backends.torch_backend import TorchBackend
from model.checkpoint import load_checkpoint

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


def sequences(seed: int, *lengths: int) -> dict[str, list[int]]:
    rng = np.random.default_rng(seed)
    return {f"sequence-{i}": rng.integers(0, 96, n).tolist() for i, n in enumerate(lengths)}


@torch.no_grad()
def expected_logits(folder: Path, tokens: list[int], dtype: torch.dtype = torch.float32) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model(torch.tensor([tokens])).logits[0].float().numpy()


def run_chunks(
    backend: TorchBackend, pages: Any, texts: dict[str, list[int]], steps: list[dict[str, int]]
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


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers_through_chunks_in_mixed_batches(
    shape: str, tiny_checkpoint: Callable[..., Path], paged: Any
) -> None:
    folder = tiny_checkpoint(shape.split("-", maxsplit=1)[0], **SHAPES[shape])
    backend = TorchBackend(load_checkpoint(folder), num_blocks=128, block_size=4)
    texts = sequences(1, 150, 9, 33)
    first, second, third = texts
    steps = [{first: 70}, {first: 1, second: 5}, {second: 1, first: 66, third: 30}]
    steps += [{third: 1, first: 1, second: 1}] * 2 + [{second: 1, third: 1}, {first: 11}]
    logits = run_chunks(backend, paged(128, 4), texts, steps)
    for name, tokens in texts.items():
        np.testing.assert_allclose(logits[name], expected_logits(folder, tokens), atol=1e-4, rtol=0)
