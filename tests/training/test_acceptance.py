"""How often a target takes what a draft proposes: counted as a server would."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shoal.model.training import acceptance
from shoal.model.training.acceptance import Acceptance, measure_acceptance
from shoal.model.training.cost import decode_seconds


def walk(pattern: str, num_spec_tokens: int) -> Acceptance:
    return acceptance._count(np.array([[letter == "y" for letter in pattern]]), 0.0, num_spec_tokens)


@pytest.mark.parametrize(
    ("pattern", "k", "rate", "length"),
    [
        ("y" * 10, 2, 1.0, 3.0),
        ("n" * 10, 2, 0.0, 1.0),
        ("ynynynyn", 2, 0.5, 2.0),  # one of two accepted, the mismatch replaced, and on
        ("yynyynyyn", 4, 0.5, 3.0),
        ("nyyyyy", 4, 0.5, 3.0),
        ("yy", 2, 0.0, 0.0),  # no room for a proposal and the token after it
    ],
)
def test_proposals_are_counted_one_after_the_other(pattern: str, k: int, rate: float, length: float) -> None:
    result = walk(pattern, k)
    assert (result.acceptance_rate, result.mean_acceptance_length) == (rate, length)


def model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def test_a_model_accepts_all_that_it_proposes_itself_and_little_of_what_another_does() -> None:
    prompts = torch.randint(40, (4, 6), generator=torch.Generator().manual_seed(1))
    target = model(0)
    assert {one.acceptance_rate for one in measure_acceptance(target, target, prompts, 24)} == {1.0}
    other = measure_acceptance(target, model(1), prompts, 24)
    assert [(one.temperature, one.num_spec_tokens) for one in other] == [
        (temperature, k) for temperature in (0.0, 0.8, 1.0) for k in (2, 4, 6)
    ]
    assert all(one.acceptance_rate < 0.5 for one in other)


def test_time_is_taken_of_each_model(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        model(0).save_pretrained(folder)
    seconds = decode_seconds(*folders)
    assert len(seconds) == 2
    assert all(0 < one < 1 for one in seconds)
