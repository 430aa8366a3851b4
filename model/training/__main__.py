"""The command line of the recipe: `python -m shoal.model.training run --budget 45min`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from shoal.scheduler.errors import ShoalError

from .pipeline import Pipeline
from .recipe import Budget, load_recipe

_HERE = Path(__file__).parent


class _Commands(click.Group):
    """Shows Shoal's errors as click shows its own: one line, and exit code 1."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except ShoalError as error:
            raise click.ClickException(error.message) from error


@click.group(cls=_Commands)
@click.option(
    "--recipe",
    default="target",
    show_default=True,
    help="target, draft or mtp (from recipes/gpu if there is a GPU, else from recipes/cpu), or a TOML file.",
)
@click.option("--work", type=click.Path(path_type=Path), default=Path(".train"), help="Folder of intermediate files.")
@click.pass_context
def main(context: click.Context, recipe: str, work: Path) -> None:
    """Train a model from the sources of pinned packages and export it."""
    context.obj = Pipeline(work, load_recipe(_find(recipe)))


def _find(recipe: str) -> Path:
    if recipe not in ("target", "draft", "mtp"):
        return Path(recipe)
    return _HERE / "recipes" / ("gpu" if torch.cuda.is_available() else "cpu") / f"{recipe}.toml"


@main.command("run")
@click.option("--budget", required=True, help="How long to train: 45min, 2h or 20Mtok, earlier runs included.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the model [model/bundled/NAME].")
@click.pass_obj
def run_all(pipeline: Pipeline, budget: str, output: Path | None) -> None:
    """Run all steps, from the corpus to the model card; steps that are done are skipped."""
    limit = Budget.parse(budget)
    for step in (pipeline.make_corpus, pipeline.make_tokenizer, pipeline.make_tokens):
        click.echo(step.__name__.replace("_", " "), err=True)
        step()
    pipeline.train(limit)
    _export_and_describe(pipeline, output)


@main.command("train")
@click.option("--budget", required=True, help="How long to train, as for `run`.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the model [model/bundled/NAME].")
@click.pass_obj
def train_only(pipeline: Pipeline, budget: str, output: Path | None) -> None:
    """Train and export; only the tokenizer and the tokens need be in the work folder."""
    pipeline.train(Budget.parse(budget))
    pipeline.export(_folder(pipeline, output))


@main.command("describe")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the model [model/bundled/NAME].")
@click.pass_obj
def describe(pipeline: Pipeline, output: Path | None) -> None:
    """Evaluate an exported model, wherever it was trained, and write its model card."""
    pipeline.describe(_folder(pipeline, output))


@main.command("export")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the model [model/bundled/NAME].")
@click.pass_obj
def export_checkpoint(pipeline: Pipeline, output: Path | None) -> None:
    """Export the last checkpoint, even while training goes on, and write its model card."""
    _export_and_describe(pipeline, output)


def _export_and_describe(pipeline: Pipeline, output: Path | None) -> None:
    folder = _folder(pipeline, output)
    pipeline.export(folder)
    if not pipeline.recipe.num_unrolled:  # a module has no card: it is a part of its target
        pipeline.describe(folder)


def _folder(pipeline: Pipeline, output: Path | None) -> Path:
    return output or _HERE.parent / "bundled" / pipeline.recipe.name


if __name__ == "__main__":
    main()
