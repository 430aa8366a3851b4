"""A recipe small enough to train in a test, with experts and without."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from shoal.model.training.recipe import NetworkConfig, Recipe, TrainingConfig

TINY = Recipe(
    name="tiny",
    network=NetworkConfig(
        vocab_size=300,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
    training=TrainingConfig(
        seed=5,
        batch_size=4,
        sequence_length=16,
        short_length=8,
        lengthen_from=0.5,
        learning_rate=1e-2,
        warmup_steps=3,
        decay_from=0.5,
        weight_decay=0.1,
        max_gradient_norm=1.0,
        balance_coefficient=0.01,
    ),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from a second thread, and lose time where other programs use the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[4, 0], ids=["experts", "dense"])
def tiny_recipe(request: pytest.FixtureRequest) -> Recipe:
    return replace(TINY, network=replace(TINY.network, num_experts=request.param))
