"""A module of multi-token prediction: it learns, it is exported, and it drafts what it has learnt."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.model.training.export import export
from shoal.model.training.network import Network
from shoal.model.training.pipeline import Pipeline
from shoal.model.training.prediction import PredictionNetwork, count_multiplied, create_network
from shoal.model.training.recipe import Budget, Recipe, load_recipe
from shoal.model.training.tokenizer import train_tokenizer
from shoal.scheduler.errors import ConfigError
from tests.model.test_prediction import serve
from tests.training.test_recipe import RECIPES
from tests.training.test_trainer import RANDOM, train


def module_of(target: Recipe) -> Recipe:
    network = replace(target.network, hidden_size=16, num_layers=1, num_experts=0, tie_word_embeddings=False)
    return replace(target, name="tiny/mtp", network=network, teacher=target, num_unrolled=3)


def wide(network: Network) -> Network:
    """The network with weights that are bfloat16 numbers, large enough that each part matters."""
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.copy_((parameter * 10 + noise * 0.2).bfloat16())
    return network


def test_a_module_learns_its_targets_distribution_at_each_depth(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Texts repeat: what follows two tokens is known from the second one, and from no text before."""
    period = np.tile(np.arange(0, 300, 7, dtype=np.uint16), 20)
    teacher, _ = train(tiny_recipe, tmp_path / "target.pt", tokens=period, budget=Budget(tokens=150 * 64))
    trainer, reports = train(
        module_of(tiny_recipe),
        tmp_path / "a.pt",
        tokens=period,
        teacher=teacher.network,
        budget=Budget(tokens=150 * 64),
    )
    assert isinstance(trainer.network, PredictionNetwork)
    assert reports[-1].loss < 0.5 * reports[0].loss


def test_a_killed_run_resumes(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe, teacher = module_of(tiny_recipe), Network(tiny_recipe.network)
    teacher.initialize(seed=2)
    _, unbroken = train(recipe, tmp_path / "a.pt", tokens=RANDOM, teacher=teacher)
    train(recipe, tmp_path / "b.pt", tokens=RANDOM, teacher=teacher, stop_after=11)
    _, after = train(recipe, tmp_path / "b.pt", tokens=RANDOM, teacher=teacher, resume=True)
    assert after == unbroken[-len(after) :]


def test_an_exported_module_drafts_what_the_network_chooses(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = module_of(tiny_recipe)
    target, module = Network(tiny_recipe.network), create_network(recipe)
    assert isinstance(module, PredictionNetwork)
    for seed, network in enumerate((target, module)):
        network.initialize(seed)
        wide(network)
    tokenizer = tmp_path / "made.json"
    train_tokenizer([Path(__file__).read_text()], tiny_recipe.network.vocab_size).save(str(tokenizer))
    export(target, tokenizer, tmp_path / "folder")
    export(module, tokenizer, tmp_path / "folder" / "mtp")
    prompts = np.random.default_rng(0).integers(0, 300, (3, 30)).tolist()
    _, proposed = serve("torch", tmp_path / "folder", prompts)
    assert len(proposed) > 20
    chosen = 0
    for text, drafted in proposed:
        token_ids = torch.tensor([text])
        with torch.no_grad():
            states, _ = target.hidden_states(token_ids)
            own, _ = module.hidden_states_after(token_ids[:, 1:], states[:, :-1])
            (first, second), order = (own[0, -1] @ module.head.T).topk(2)
        if drafted and first - second > 1e-3:
            assert drafted[0] == order[0]
            chosen += 1
    assert chosen > 10


@pytest.mark.parametrize("hardware", ["cpu", "gpu"])
def test_the_module_costs_no_more_than_the_draft(hardware: str) -> None:
    module, draft = (load_recipe(RECIPES / hardware / f"{name}.toml") for name in ("mtp", "draft"))
    assert module.num_unrolled == 3
    assert 0.95 * count_multiplied(draft) < count_multiplied(module) <= count_multiplied(draft)


def test_a_module_without_a_target_is_refused(tiny_recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="needs a teacher") as error:
        replace(tiny_recipe, num_unrolled=3)
    assert error.value.param == "num_unrolled"


def test_a_module_belongs_into_the_folder_of_its_target(tmp_path: Path) -> None:
    module = load_recipe(RECIPES / "cpu" / "mtp.toml")
    assert module.teacher is not None
    checkpoints = [Pipeline(tmp_path, recipe).checkpoint for recipe in (module, module.teacher)]
    assert checkpoints[0].parent == checkpoints[1].parent / "mtp"
