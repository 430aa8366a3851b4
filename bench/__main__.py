"""`python -m bench [engine|roofline|server|peers ...]`: run benchmarks, all if none is named."""

from __future__ import annotations

import json
from pathlib import Path

import click

from bench import engine, peers, roofline, server
from model.checkpoint import resolve_checkpoint


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(["engine", "roofline", "server", "peers", "speculation"]))
@click.option("--model", default="shoal-moe", show_default=True, help="Checkpoint folder or name of a bundled model.")
@click.option("--steps", default=200, show_default=True, help="Steps that each engine figure is the median of.")
@click.option("--repeats", default=5, show_default=True, help="Runs that each server figure is the median of.")
@click.option("--max-tokens", default=128, show_default=True, help="Tokens of each stream in the server benchmark.")
def main(names: tuple[str, ...], model: str, steps: int, repeats: int, max_tokens: int) -> None:
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
    print(json.dumps(results))


main()
