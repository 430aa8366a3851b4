"""`python -m bench [NAME ...]`: run benchmarks, all if none is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from bench import cluster, constraints, engine, latent, peers, roofline, router, scheduling, server, speculation, start
from shoal.model.checkpoint.find import resolve_checkpoint

BENCHMARKS: dict[str, Callable[..., dict[str, object]]] = {
    "engine": engine.run,
    "roofline": roofline.run,
    "latent": latent.run,
    "start": start.run,
    "server": server.run,
    "constraints": constraints.run,
    "scheduling": scheduling.run,
    "router": router.run,
    "cluster": cluster.run,
    "peers": peers.run,
    "speculation": speculation.run,
}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)))
@click.option("--model", default="shoal-moe", show_default=True, help="Checkpoint folder or name of a bundled model.")
@click.option("--steps", default=200, show_default=True, help="Steps that each time of a step is the median of.")
@click.option("--repeats", default=5, show_default=True, help="Runs that each server figure is the median of.")
@click.option("--max-tokens", default=128, show_default=True, help="Tokens of each stream or request.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice((*speculation.METHODS, "mtp")),
    default=speculation.METHODS,
    help="Proposer in the speculation benchmark; may be given again [all but mtp].",
)
@click.option(
    "--concurrency",
    "concurrencies",
    multiple=True,
    type=click.IntRange(min=1),
    default=speculation.CONCURRENCIES,
    help="Requests at once in the speculation benchmark; may be given again [1 to 64].",
)
@click.option(
    "--device", default="cpu", show_default=True, help="Where the models of the speculation benchmark run: cpu or cuda."
)
@click.option("--picture", type=click.Path(path_type=Path), help="PNG of the speculation benchmark to write.")
def main(names: tuple[str, ...], model: str, **options: Any) -> None:
    """Run benchmarks; prints tables, and one JSON line last."""
    checkpoint = resolve_checkpoint(model)
    results: dict[str, object] = {"model": checkpoint.name}
    for name in names or BENCHMARKS:
        results |= BENCHMARKS[name](checkpoint, **options)
    print(json.dumps(results))


main()
