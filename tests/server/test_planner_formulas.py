"""The planner's formulas, against the products that the torch backend computes, and against published figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shoal.model.architecture import KVLayout, LatentConfig, MixtureConfig, bytes_per_block
from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.record import ModelRecord
from shoal.server.planner import formulas
from shoal.server.planner.costs import Costs, Split, Step
from shoal.server.planner.machines import MACHINES
from shoal.server.planner.measure import uniform_step
from shoal.server.planner.subject import read_shapes
from tests.model.families import CONFIGURATIONS, write
from tests.model.oracles import random_record

# Sizes for which the torch backend pads nothing: heads come in fours, all else in multiples of 32.
EVEN: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"num_heads": 4, "num_kv_heads": 1},
    "GQA": {"num_heads": 8, "num_kv_heads": 2, "tie_word_embeddings": False},
    "without a gate": {"num_heads": 4, "num_kv_heads": 1, "gated": False},
    "mixture": {"num_heads": 4, "num_kv_heads": 1, "num_experts": 32, "num_experts_per_tok": 32},
    "shared expert": {
        "num_heads": 4,
        "num_kv_heads": 1,
        "num_experts": 32,
        "num_experts_per_tok": 32,
        "shared_size": 32,
    },
    "MLA": {
        "num_heads": 4,
        "num_kv_heads": 4,
        "latent": LatentConfig(rank=64, rope_dim=32, nope_dim=32, value_dim=32, query_rank=32),
    },
}
BLOCK_SIZE = 16


def grouped_mm(rows: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of the experts' products; rows after the last expert's belong to nobody."""
    return 2 * int(offs[-1]) * weight.shape[-2] * weight.shape[-1]


def baddbmm(_: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **__: Any) -> int:
    """FLOPs of a product that is added in place."""
    return 2 * left.numel() * right.shape[-1]


for function in (grouped_mm, baddbmm):
    function._get_raw = True  # type: ignore[attr-defined]
# What torch does not count by itself.
UNCOUNTED = {torch.ops.aten._grouped_mm: grouped_mm, torch.ops.aten.baddbmm_: baddbmm}


def counted(record: ModelRecord, step: Step) -> int:
    """FLOPs of the products that the torch backend computes in a step."""
    batch, _ = uniform_step(record.config, step, BLOCK_SIZE)
    backend = TorchBackend(
        record, device="cpu", dtype="float32", num_blocks=batch.block_tables.size, block_size=BLOCK_SIZE
    )
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        backend.forward(batch)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [64, 256])
def test_decode_has_the_counted_flops(name: str, length: int) -> None:
    record = random_record(**EVEN | MODELS[name])
    step = Step.decode(4, length)
    assert Costs.of(record, "float32", 4).flops(step) == counted(record, step)


@pytest.mark.parametrize("name", MODELS)
def test_prefill_has_the_counted_flops_but_for_pairs_that_are_masked(name: str) -> None:
    """The backend multiplies each of 32 queries with all 32 keys."""
    record = random_record(**EVEN | MODELS[name])
    step, heads = Step(4, 32, 32, 128), record.config.num_heads
    seen = 4 * formulas.num_pairs(record.config.kv_layouts[0], 0, 32)
    hidden = [formulas.attention_flops(layout, heads, 4 * 32 * 32 - seen) for layout in record.config.kv_layouts]
    assert Costs.of(record, "float32", 4).flops(step) + sum(hidden) == counted(record, step)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_parameters_of_every_family_follow_from_its_config_alone(name: str, tmp_path: Path) -> None:
    whole = load_checkpoint(write(name, tmp_path))
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    costs = Costs.of(read_shapes(str(tmp_path / "config.json")), "float32", 4)
    assert costs.num_parameters == whole.num_parameters
    outside = costs.num_parameters - sum(layer.num_parameters for layer in costs.layers)
    assert 0 < outside <= 2 * whole.embedding.size + sum(
        array.size for name, *_, array in whole.tensors() if name in {"positions", "norm", "norm.bias", "head.bias"}
        or name.startswith("embedding_norm")
    )  # fmt: skip


@pytest.mark.parametrize("name", ["dense", "GQA", "MLA"])
def test_a_token_takes_its_share_of_a_block(name: str) -> None:
    record = random_record(**EVEN | MODELS[name])
    block = bytes_per_block(record.config, "float32", BLOCK_SIZE)
    assert Costs.of(record, "float32", 4).cache_bytes(5 * BLOCK_SIZE) == 5 * block


@pytest.mark.parametrize(("window", "chunk"), [(0, 0), (5, 0), (0, 4), (50, 0)])
def test_pairs_are_those_that_a_query_sees(window: int, chunk: int) -> None:
    layout = KVLayout(1, 8, 8, window=window, chunk=chunk)

    def sees(query: int, key: int) -> bool:
        in_window = not window or query - key < window
        return key <= query and in_window and (not chunk or query // chunk == key // chunk)

    for before, num_tokens in ((0, 1), (0, 23), (7, 1), (9, 14)):
        queries = range(before, before + num_tokens)
        assert formulas.num_pairs(layout, before, num_tokens) == sum(sees(q, k) for q in queries for k in range(q + 1))


def test_experts_that_are_read() -> None:
    mixture = MixtureConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=1)
    assert formulas.touched_experts(mixture, 1) == pytest.approx(1 / 4)
    assert formulas.touched_experts(mixture, 2) == pytest.approx(7 / 16)
    assert formulas.touched_experts(mixture, 1e4) == 1


def test_the_roofline() -> None:
    assert formulas.roofline_seconds(200, 10, flops_rate=100, bandwidth=10) == 2
    assert formulas.roofline_seconds(50, 10, flops_rate=100, bandwidth=10) == 1
    assert formulas.ridge(100, 10) == 10


def test_speculation() -> None:
    """Leviathan et al. 2023: (1 - a^(k+1)) / (1 - a) tokens a step."""
    assert formulas.tokens_per_step(0.8, 4) == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    least = formulas.least_acceptance(2.0, 4)
    assert least is not None
    assert formulas.tokens_per_step(least, 4) == pytest.approx(2.0)
    assert formulas.least_acceptance(5.1, 4) is None


def test_bytes_on_the_wire() -> None:
    """Worked out by hand: a message of 100 bytes a token, 8 tokens, 4 ranks."""
    assert formulas.all_reduce_bytes(800, 4) == 1200
    assert formulas.all_gather_bytes(800, 4) == 600
    assert formulas.tensor_parallel_bytes(100, 8, 2, 4) == 2400
    assert formulas.expert_parallel_bytes(100, 8, 2, 4) == 2 * 200 * 2 * 3 / 4
    assert formulas.tensor_parallel_bytes(100, 8, 2, 1) == formulas.expert_parallel_bytes(100, 8, 2, 1) == 0
    assert formulas.fsdp_bytes(100, 4) == 450


def test_training_memory() -> None:
    """16 bytes a parameter: a model of 7.5 billion takes 120 GB, and 1.9 GB on each of 64 ranks (Rajbhandari et al.
    2020, figure 1).  Layers of GPT-3 keep s b h (34 + 5 a s / h) bytes (Korthikanti et al. 2022, section 5: 80 for
    5 a s / h)."""
    assert sum(formulas.training_state_bytes(7.5e9).values()) == 120e9
    assert sum(formulas.training_state_bytes(7.5e9, 64).values()) == pytest.approx(1.9e9, rel=0.02)
    assert formulas.activation_bytes(2048, 2048, 12288, 96, 1) == 2048 * 12288 * (34 + 80)
    assert formulas.training_flops(10, 7) == 6 * 10 * 7


@pytest.mark.parametrize("name", ["dense", "GQA", "mixture"])
def test_one_rank_is_no_split(name: str) -> None:
    costs, machine, step = (
        Costs.of(random_record(**EVEN | MODELS[name]), "float32", 4),
        MACHINES["a100"],
        Step.decode(4, 64),
    )
    assert Split().seconds(costs, step, machine) == pytest.approx((costs.seconds(step, machine), 0))
    assert Split().weight_bytes(costs) == costs.weight_bytes
    assert Split(tp=2).weight_bytes(costs) == costs.weight_bytes / 2
    assert Split(ep=2).weight_bytes(costs) == costs.weight_bytes - 2 * sum(
        c.num_expert_parameters for c in costs.layers
    )
