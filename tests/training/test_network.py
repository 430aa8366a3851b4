"""The network's own backward passes against autograd, and its exports against transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from shoal.model.training import experts
from shoal.model.training.attention import causal_attention
from shoal.model.training.experts import route_through_experts
from shoal.model.training.export import export
from shoal.model.training.loss import (
    ACCEPTANCE_TEMPERATURE,
    chunked_acceptance_loss,
    chunked_cross_entropy,
    chunked_distillation,
)
from shoal.model.training.network import Network
from shoal.model.training.recipe import Recipe
from shoal.model.training.tokenizer import train_tokenizer
from shoal.scheduler.errors import CheckpointError


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_experts_are_the_sum_of_swiglus_and_so_are_their_gradients() -> None:
    torch.manual_seed(0)
    x, gate_up, down = doubles(20, 6), doubles(4, 10, 6), doubles(4, 6, 5)
    weights = torch.rand(20, 2, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack([torch.randperm(3)[:2] for _ in range(20)])  # expert 3 gets nothing
    rows = []
    for token in range(20):
        total = x.new_zeros(6)
        for choice, weight in zip(chosen[token], weights[token], strict=True):
            gate, up = (gate_up[choice] @ x[token]).chunk(2)
            total = total + weight * (down[choice] @ (F.silu(gate) * up))
        rows.append(total)
    expected = torch.stack(rows)
    actual = route_through_experts(x, weights, chosen, gate_up, down)
    torch.testing.assert_close(actual, expected)
    assert_same_gradients(actual, expected, (x, weights, gate_up, down))


def test_grouped_experts_are_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU computes, computed here; grouped products exist in bfloat16 only."""
    torch.manual_seed(0)
    x = torch.randn(40, 32, dtype=torch.bfloat16, requires_grad=True)
    gate_up, down = torch.randn(4, 48, 32, requires_grad=True), torch.randn(4, 32, 24, requires_grad=True)
    weights = torch.rand(40, 2, requires_grad=True)
    chosen = torch.stack([torch.randperm(3)[:2] for _ in range(40)])
    leaves = x, weights, gate_up, down
    expected = route_through_experts(*leaves[:2], chosen, *leaves[2:])
    actual = experts._grouped(*leaves[:2], chosen, *leaves[2:])
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, atol=0.01 * scale, rtol=0)
    direction = torch.randn_like(expected)
    pairs = zip(*(torch.autograd.grad(y, leaves, direction) for y in (actual, expected)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=0.01 * other.abs().max().item(), rtol=0)


@pytest.mark.parametrize("length", [1, 127, 300])
def test_causal_attention_is_torchs_own(length: int) -> None:
    torch.manual_seed(0)
    queries, keys, values = doubles(2, 4, length, 8), doubles(2, 2, length, 8), doubles(2, 2, length, 8)
    actual = causal_attention(queries, keys, values)
    expected = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(actual, expected)
    assert_same_gradients(actual, expected, (queries, keys, values))


def assert_same_gradients(actual: torch.Tensor, expected: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> None:
    direction = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, direction), torch.autograd.grad(expected, leaves, direction)
    )


def test_chunked_cross_entropy_is_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden, head = doubles(1100, 4), doubles(30, 4)
    targets = torch.randint(30, (1100,))
    actual, expected = chunked_cross_entropy(hidden, head, targets), F.cross_entropy(hidden @ head.T, targets)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(3 * actual, (hidden, head)), torch.autograd.grad(3 * expected, (hidden, head))
    )


def test_chunked_distillation_is_cross_entropy_with_soft_targets() -> None:
    torch.manual_seed(0)
    hidden, head = doubles(1100, 4), doubles(30, 4)
    teacher_hidden, teacher_head = torch.randn(1100, 6).double(), torch.randn(30, 6).double()
    actual = chunked_distillation(hidden, head, teacher_hidden, teacher_head)
    expected = F.cross_entropy(hidden @ head.T, (teacher_hidden @ teacher_head.T).softmax(-1))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(3 * actual, (hidden, head)), torch.autograd.grad(3 * expected, (hidden, head))
    )


def test_the_acceptance_loss_is_the_log_of_what_both_distributions_have_in_common() -> None:
    torch.manual_seed(0)
    hidden, head = doubles(1100, 4), doubles(30, 4)
    teacher_hidden, teacher_head = torch.randn(1100, 6).double(), torch.randn(30, 6).double()
    actual = chunked_acceptance_loss(hidden, head, teacher_hidden, teacher_head)
    logits = hidden @ head.T, teacher_hidden @ teacher_head.T
    drafted, wanted = ((one / ACCEPTANCE_TEMPERATURE).softmax(-1) for one in logits)
    expected = -torch.minimum(drafted, wanted).sum(-1).log().mean()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(3 * actual, (hidden, head)), torch.autograd.grad(3 * expected, (hidden, head))
    )


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_products_in_bfloat16_come_close_to_those_in_float32(tiny_recipe: Recipe, tie_word_embeddings: bool) -> None:
    config = replace(tiny_recipe.network, tie_word_embeddings=tie_word_embeddings)
    exact, fast = Network(config), Network(config, torch.bfloat16)
    exact.initialize(seed=1)
    fast.load_state_dict(exact.state_dict())
    windows = torch.randint(300, (8, 17), generator=torch.Generator().manual_seed(2))
    losses = [network.loss(windows[:, :-1], windows[:, 1:])[0] for network in (exact, fast)]
    torch.testing.assert_close(*losses, atol=1e-2, rtol=0)
    for loss in losses:
        loss.backward()
    for one, other in zip(exact.parameters(), fast.parameters(), strict=True):
        assert F.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0) > 0.98


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def exported(request: pytest.FixtureRequest, tiny_recipe: Recipe, tmp_path: Path) -> tuple[Network, Path]:
    """A network whose weights are bfloat16 numbers, wide enough that each part matters, and its folder."""
    network = Network(replace(tiny_recipe.network, tie_word_embeddings=request.param))
    network.initialize(seed=1)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.copy_((parameter * 10 + noise * 0.1).bfloat16())
    tokenizer = tmp_path / "made.json"
    train_tokenizer([Path(__file__).read_text()], tiny_recipe.network.vocab_size).save(str(tokenizer))
    export(network, tokenizer, tmp_path / "folder")
    return network, tmp_path / "folder"


def test_an_exported_network_has_the_logits_that_transformers_computes(exported: tuple[Network, Path]) -> None:
    network, folder = exported
    oracle: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    token_ids = torch.randint(300, (3, 50), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, actual = oracle(token_ids).logits, network(token_ids)
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, atol=2e-4 * expected.std().item(), rtol=0)
    loss = oracle(token_ids, labels=token_ids).loss
    torch.testing.assert_close(network.loss(token_ids[:, :-1], token_ids[:, 1:])[0], loss, atol=1e-4, rtol=1e-5)


def test_an_export_is_bfloat16_under_the_classic_names(exported: tuple[Network, Path]) -> None:
    network, folder = exported
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118  (not a dict)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in tensors) == (not config["tie_word_embeddings"])
    if network.config.num_experts:
        assert config["architectures"] == ["MixtralForCausalLM"]
        assert tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"].shape == (32, 24)
    else:
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (32, 24)


def test_a_missing_tokenizer_is_refused_by_name(tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.json is missing"):
        export(Network(tiny_recipe.network), tmp_path / "gone.json", tmp_path)
