"""The command line of the recipe: `python -m model.training run --budget 45min`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from scheduler.errors import ShoalError

from .pipeline import Pipeline
from .recipe import Budget, load_recipe

_HERE = Path(__file__).parent


class _Commands(click.Group):
    """Shows our own errors as click shows its own: one line, and exit code 1."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except ShoalError as error:
            raise click.ClickException(error.message) from error


@click.group(cls=_Commands)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path, dir_okay=False),
    default=_HERE / "recipes" / "target.toml",
    help="TOML file with the sizes and settings.",
)
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path(".train"), help="Folder of everything in between."
)
@click.pass_context
def main(context: click.Context, recipe: Path, work: Path) -> None:
    """Train a model from the sources of pinned packages and export it."""
    context.obj = Pipeline(work, load_recipe(recipe))


@main.command("run")
@click.option("--budget", required=True, help="How long to train: 45min, 2h or 20Mtok, earlier runs included.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the model [model/bundled/NAME].")
@click.pass_obj
def run_all(pipeline: Pipeline, budget: str, output: Path | None) -> None:
    """Walk all steps, from the corpus to the model card; steps that are done are skipped."""
    limit = Budget.parse(budget)
    for step in (pipeline.make_corpus, pipeline.make_tokenizer, pipeline.make_tokens):
        click.echo(step.__name__.replace("_", " "), err=True)
        step()
    pipeline.train(limit)
    _export_and_describe(pipeline, output)


@main.command("export")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the model [model/bundled/NAME].")
@click.pass_obj
def export_checkpoint(pipeline: Pipeline, output: Path | None) -> None:
    """Export the last checkpoint, even while training goes on, and write its model card."""
    _export_and_describe(pipeline, output)


def _export_and_describe(pipeline: Pipeline, output: Path | None) -> None:
    folder = output or _HERE.parent / "bundled" / pipeline.recipe.name
    pipeline.export(folder)
    pipeline.describe(folder)


if __name__ == "__main__":
    main()
