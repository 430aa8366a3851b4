"""The bundled model, through transformers: it loads, it is small, and it has learnt from what it was trained on."""

import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import model
from model.training.corpus import clean, is_validation, is_worth_reading
from model.training.sources import SourceFile, read_stdlib

FOLDER = Path(model.__file__).parent / "bundled" / "shoal-moe"


@pytest.fixture(scope="module")
def bundled() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


def test_it_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 20e6
    assert (FOLDER / "README.md").read_text().count("## ") >= 4


def test_it_predicts_held_out_files_far_better_than_chance(bundled: Any, tokenizer: Any) -> None:
    cleaned = (SourceFile(file.package, file.path, clean(file.text)) for file in read_stdlib() if is_validation(file))
    held_out = list(islice(filter(is_worth_reading, cleaned), 6))
    assert len(held_out) == 6
    losses = []
    for file in held_out:
        token_ids = tokenizer(file.text, return_tensors="pt", truncation=True, max_length=1024)["input_ids"]
        with torch.no_grad():
            losses.append(bundled(token_ids, labels=token_ids).loss.item())
    assert sum(losses) / len(losses) < 0.5 * math.log(bundled.config.vocab_size)


def test_a_chat_ends_its_turn_among_the_tokens_that_stop_it(bundled: Any, tokenizer: Any) -> None:
    assert bundled.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
