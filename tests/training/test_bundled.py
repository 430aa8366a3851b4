"""The bundled models, through transformers: they load, they are small, and they have learnt what they were taught."""

import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoal import model
from shoal.model.training.corpus import clean, is_validation, is_worth_reading
from shoal.model.training.sources import SourceFile, read_stdlib

BUNDLED = Path(model.__file__).parent / "bundled"
TARGET, DRAFT = BUNDLED / "shoal-moe", BUNDLED / "shoal-draft"


@pytest.fixture(scope="module")
def models() -> dict[Path, Any]:
    return {folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (TARGET, DRAFT)}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TARGET)


@pytest.fixture(scope="module")
def held_out(tokenizer: Any) -> list[torch.Tensor]:
    """The beginnings of six held-out files, [1, length] each."""
    cleaned = (SourceFile(file.package, file.path, clean(file.text)) for file in read_stdlib() if is_validation(file))
    files = list(islice(filter(is_worth_reading, cleaned), 6))
    assert len(files) == 6
    return [tokenizer(file.text, return_tensors="pt", truncation=True, max_length=1024)["input_ids"] for file in files]


def test_they_are_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for folder in (TARGET, DRAFT) for path in folder.iterdir()) < 40e6
    for folder in (TARGET, DRAFT):
        assert (folder / "README.md").read_text().count("## ") >= 4


@pytest.mark.parametrize(("folder", "share"), [(TARGET, 0.28), (DRAFT, 0.39)], ids=["target", "draft"])
def test_they_predict_held_out_files_far_better_than_chance(
    folder: Path, share: float, models: dict[Path, Any], held_out: list[torch.Tensor]
) -> None:
    losses = []
    for token_ids in held_out:
        with torch.no_grad():
            losses.append(models[folder](token_ids, labels=token_ids).loss.item())
    assert sum(losses) / len(losses) < share * math.log(models[folder].config.vocab_size)


def test_the_draft_has_learnt_from_this_target(models: dict[Path, Any], held_out: list[torch.Tensor]) -> None:
    """The draft predicts the token that the target predicts more often than the token of the text."""
    agreement, accuracy = [], []
    for token_ids in held_out:
        with torch.no_grad():
            target, draft = (models[folder](token_ids).logits[0, :-1].argmax(-1) for folder in (TARGET, DRAFT))
        agreement.append((draft == target).float().mean().item())
        accuracy.append((draft == token_ids[0, 1:]).float().mean().item())
    assert sum(agreement) / len(agreement) > 0.54
    assert sum(agreement) > 1.2 * sum(accuracy)


def test_draft_and_target_have_the_same_tokenizer() -> None:
    assert (DRAFT / "tokenizer.json").read_bytes() == (TARGET / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("folder", [TARGET, DRAFT], ids=["target", "draft"])
def test_a_chat_ends_its_turn_among_the_tokens_that_stop_it(
    folder: Path, models: dict[Path, Any], tokenizer: Any
) -> None:
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    assert models[folder].generation_config.eos_token_id == stops
