"""Recipes and budgets: read from text, and refused by the name of what is wrong."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from shoal.model.training import pipeline
from shoal.model.training.__main__ import _find, main
from shoal.model.training.network import count_active_parameters
from shoal.model.training.recipe import Budget, load_recipe
from shoal.scheduler.errors import ConfigError

RECIPES = Path(pipeline.__file__).parent / "recipes"
TARGET = RECIPES / "cpu" / "target.toml"


@pytest.mark.parametrize(
    ("text", "budget"),
    [("45min", Budget(seconds=2700)), ("2h", Budget(seconds=7200)), ("0.5Mtok", Budget(tokens=500_000))],
)
def test_a_budget(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["", "45", "45 min", "-1h", "0h", "nanh", "1e3min"])
def test_a_budget_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="is not like 45min") as error:
        Budget.parse(text)
    assert error.value.param == "budget"


@pytest.mark.parametrize(
    ("old", "new", "param"),
    [
        ("hidden_size = 256", "hidden = 256", "hidden"),
        ("hidden_size = 256", "", "hidden_size"),
        ("hidden_size = 256", 'hidden_size = "256"', "hidden_size"),
        ("hidden_size = 256", "hidden_size = 256.5", "hidden_size"),
        ("num_kv_heads = 2", "num_kv_heads = 3", "num_kv_heads"),
        ("num_experts_per_tok = 2", "num_experts_per_tok = 9", "num_experts_per_tok"),
        ("short_length = 256", "short_length = 300", "short_length"),
        ("tie_word_embeddings = true", "tie_word_embeddings = 1", "tie_word_embeddings"),
        ("[training]", "[train]", "train"),
        ("seed = 1", "seed = ", "recipe.toml"),
    ],
)
def test_a_wrong_recipe_is_refused_by_key(tmp_path: Path, old: str, new: str, param: str) -> None:
    text = TARGET.read_text()
    assert text.count(old) == 1
    path = tmp_path / "recipe.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    assert error.value.param == param


@pytest.mark.parametrize("hardware", ["cpu", "gpu"])
def test_the_draft_costs_a_tenth_of_its_target_at_most(hardware: str) -> None:
    draft = load_recipe(RECIPES / hardware / "draft.toml")
    assert draft.teacher == load_recipe(RECIPES / hardware / "target.toml")
    assert count_active_parameters(draft.network) <= 0.1 * count_active_parameters(draft.teacher.network)


def test_a_draft_of_another_vocabulary_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "target.toml").write_text(TARGET.read_text())
    (tmp_path / "draft.toml").write_text((RECIPES / "cpu" / "draft.toml").read_text().replace("4096", "2048"))
    result = CliRunner().invoke(
        main, ["--recipe", str(tmp_path / "draft.toml"), "--work", str(tmp_path / "work"), "run", "--budget", "1h"]
    )
    assert result.exit_code == 1
    assert "the draft shoal-draft has vocab_size 2048, its target shoal-moe has 4096" in result.output
    assert not (tmp_path / "work").exists()


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    work = str(tmp_path)
    result = CliRunner().invoke(main, ["--work", work, "run", "--budget", "soon"])
    assert result.exit_code == 1
    assert result.output == "Error: budget 'soon' is not like 45min, 2h or 20Mtok\n"
    result = CliRunner().invoke(main, ["--work", work, "export", "--output", work])
    assert result.exit_code == 1
    assert "tokenizer.json is missing" in result.output
    result = CliRunner().invoke(main, ["--work", work, "--recipe", "draft", "describe", "--output", work])
    assert result.exit_code == 1
    assert "shoal-draft/provenance.json is missing: export the model first" in result.output
    result = CliRunner().invoke(main, ["--work", work, "train", "--budget", "1Mtok", "--output", work])
    assert result.exit_code == 1
    assert "tokenizer.json" in result.output


@pytest.mark.parametrize(("has_gpu", "folder"), [(True, "gpu"), (False, "cpu")])
def test_a_recipe_is_for_the_hardware_at_hand(monkeypatch: pytest.MonkeyPatch, has_gpu: bool, folder: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    assert _find("draft") == RECIPES / folder / "draft.toml"
    assert _find("some/recipe.toml") == Path("some/recipe.toml")
