"""Recipes and budgets: read from text, and refused by the name of what is wrong."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from model.training import pipeline
from model.training.__main__ import main
from model.training.recipe import Budget, load_recipe
from scheduler.errors import ConfigError

TARGET = Path(pipeline.__file__).parent / "recipes" / "target.toml"


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


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    work = str(tmp_path)
    result = CliRunner().invoke(main, ["--work", work, "run", "--budget", "soon"])
    assert result.exit_code == 1
    assert result.output == "Error: budget 'soon' is not like 45min, 2h or 20Mtok\n"
    result = CliRunner().invoke(main, ["--work", work, "export", "--output", work])
    assert result.exit_code == 1
    assert "tokenizer.json is missing" in result.output
