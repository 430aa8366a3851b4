"""`shoal inspect`: what a model is, what it takes, and what will serve it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shoal.cli import main
from shoal.model.backends.native_library import supported_isas
from shoal.model.checkpoint.load import load_checkpoint, outline_checkpoint
from tests.e2e.checkpoints import random_checkpoint
from tests.gguf_writer import write_gguf
from tests.model.families import write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inspection")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, args)])


def told(model: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(model, "--json").stdout)
    return found


def parts(model: object) -> dict[str, tuple[int, int]]:
    return {part["name"]: (part["num_parameters"], part["num_active"]) for part in told(model)["parts"]}


def test_the_bundled_model() -> None:
    about = told("shoal-moe")
    assert (about["family"], about["sizes"]["num_layers"], about["precision"]) == ("mixtral", 6, "bfloat16")
    assert about["differences"] == {"mixture": "num_experts 8, num_experts_per_tok 2, intermediate_size 128"}
    assert about["held"] == {"bfloat16": [188, 2 * 15_497_728]}
    assert about["num_weight_bytes"] == 2 * 15_497_728 + 2 * 13 * 512  # gains of norms become float32
    experts = 6 * 8 * 3 * 128 * 512
    assert parts("shoal-moe")["experts"] == (experts, experts // 4)
    expected = "bfloat16 weights, native (" if supported_isas() else "float32, torch"
    assert about["served_by"].startswith(expected)


def test_other_attention_of_the_same_width() -> None:
    """Two KV heads of width 64 in 6 layers; latent attention keeps 4.5 times a head's width."""
    assert told("shoal-moe")["cache"] == {"6 that see all positions": 6 * 2 * 2 * 64 * 4}
    as_other = told("shoal-moe")["cache_as"]
    assert as_other == {
        "this model": 1536,
        "MHA": 6144,
        "GQA, 8 heads share": 768,
        "MQA": 768,
        "MLA": 6 * 288,
    }


@pytest.mark.parametrize(
    ("name", "cache", "differences"),
    [
        (
            "deepseek_v2-lite",
            {"2 that see all positions": 2 * (24 + 8) * 4},
            {
                "latent": "rank 24, rope_dim 8, nope_dim 12, value_dim 10",
                "rope": "theta 10000, dim 8",
                "mixture": "none in layers 0; num_experts 16, num_experts_per_tok 4, intermediate_size 20, "
                "renormalise no, scale 1.5, shared_size 40 in layers 1",
            },
        ),
        (
            "olmo3",
            {"3 that see a window of 12": 192, "1 that see all positions": 64},
            {
                "qk_norm": "whole",
                "qk_norm_eps": "1e-05",
                "window": "12 in layers 0-2; none in layers 3",
                "also has": "attention_output_norm, feed_forward_output_norm, k_norm, q_norm",
                "lacks": "feed_forward_norm, input_norm",
            },
        ),
        ("olmo", {"2 that see all positions": 896}, {"norm": "layer", "norms": "without gain"}),
    ],
)
def test_what_differs_from_llama(name: str, cache: dict[str, int], differences: dict[str, str], folder: Path) -> None:
    about = told(write(name, folder / name))
    assert (about["cache"], about["differences"]) == (cache, differences)


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "bloom", "opt-350m"])
def test_all_parameters_are_counted(name: str, folder: Path) -> None:
    checkpoint = write(name, folder / name)
    assert sum(total for total, _ in parts(checkpoint).values()) == load_checkpoint(checkpoint).num_parameters


def test_an_outline_reads_no_weights(folder: Path) -> None:
    checkpoint = write("mistral", folder / "mistral")
    whole = {place: array.shape for *place, array in load_checkpoint(checkpoint).tensors() for place in [tuple(place)]}
    for *place, array in outline_checkpoint(checkpoint).tensors():
        assert whole[tuple(place)] == array.shape
        assert not any(array.strides) and not array.any()


def test_a_gguf_file(folder: Path) -> None:
    path = folder / "model.gguf"
    write_gguf(path, random_checkpoint(folder / "plain"))
    assert told(path)["family"] == "mixtral"
    assert sum(size for _, size in told(path)["held"].values()) < path.stat().st_size
    tables = run(path).stdout
    assert "KV cache of a token" in tables and "served by" in tables


def test_what_cannot_be_read_is_named(folder: Path) -> None:
    checkpoint = write("glm", folder / "glm")
    config = checkpoint / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "mamba"}))
    failed = run(checkpoint)
    assert failed.exit_code == 2
    assert failed.stderr.startswith(f"shoal inspect: {config}: model_type: ") and "Mamba" in failed.stderr


def test_what_cannot_be_served_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_ENGINE__BACKEND", "native")
    monkeypatch.setenv("SHOAL_CACHE__BLOCK_SIZE", "5")
    about = told("shoal-moe")
    assert about["served_by"] is None
    assert about["obstacle"].startswith("block_size 5 is not for the native backend")
