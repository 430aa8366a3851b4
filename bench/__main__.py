"""`python -m bench [engine|roofline|server|peers|speculation ...]`: run benchmarks, all if none is named."""

from __future__ import annotations

import json
from pathlib import Path

import click

from bench import engine, peers, roofline, server, speculation
from shoal.model.checkpoint.find import resolve_checkpoint


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(["engine", "roofline", "server", "peers", "speculation"]))
@click.option("--model", default="shoal-moe", show_default=True, help="Checkpoint folder or name of a bundled model.")
@click.option("--steps", default=200, show_default=True, help="Steps that each time of a step is the median of.")
@click.option("--repeats", default=5, show_default=True, help="Runs that each server figure is the median of.")
@click.option("--max-tokens", default=128, show_default=True, help="Tokens of each stream or request.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(speculation.METHODS),
    help="Proposer in the speculation benchmark; may be given again [all].",
)
@click.option(
    "--concurrency",
    "concurrencies",
    multiple=True,
    type=click.IntRange(min=1),
    help="Requests at once in the speculation benchmark; may be given again [1 to 64].",
)
@click.option(
    "--device", default="cpu", show_default=True, help="Where the models of the speculation benchmark run: cpu or cuda."
)
@click.option(
    "--picture", type=click.Path(path_type=Path, dir_okay=False), help="PNG of the speculation benchmark to write."
)
def main(
    *,
    names: tuple[str, ...],
    model: str,
    steps: int,
    repeats: int,
    max_tokens: int,
    methods: tuple[str, ...],
    concurrencies: tuple[int, ...],
    device: str,
    picture: Path | None,
) -> None:
    """Run benchmarks; prints tables, and one JSON line last."""
    checkpoint: Path = resolve_checkpoint(model)
    results: dict[str, object] = {"model": checkpoint.name}
    if not names or "engine" in names:
        results |= engine.run(checkpoint, steps)
    if not names or "roofline" in names:
        results |= roofline.run(checkpoint, steps)
    if not names or "server" in names:
        results |= server.run(checkpoint, repeats, max_tokens)
    if not names or "peers" in names:
        results |= peers.run(repeats, max_tokens)
    if not names or "speculation" in names:
        results |= speculation.run(
            checkpoint,
            methods=methods or speculation.METHODS,
            concurrencies=concurrencies or speculation.CONCURRENCIES,
            steps=steps,
            repeats=repeats,
            max_tokens=max_tokens,
            device=device,
            picture=picture,
        )
    print(json.dumps(results))


main()
