"""The command `shoal plan`."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from shoal.scheduler.errors import ShoalError
from shoal.server.wire.engine import MAX_BATCH, MAX_RANKS, MachineName
from shoal.terminal import CommandError, echo_json, json_option, show

_COUNT = click.IntRange(min=1)
_RANKS = click.IntRange(1, MAX_RANKS)


@click.command()
@click.argument("model")
@click.option("--machine", type=click.Choice(get_args(MachineName)), default="auto", help="auto is this one, measured.")
@click.option("--context", type=_COUNT, help="Tokens of a sequence; 4096, or as many as the model can have.")
@click.option(
    "--batch", type=click.IntRange(1, MAX_BATCH), default=64, help="Most sequences of a step; 64 if not given."
)
@click.option("--tp", type=_RANKS, default=1, help="Tensor-parallel ranks, which share each matrix.")
@click.option("--ep", type=_RANKS, default=1, help="Expert-parallel ranks, which share the experts.")
@click.option("--pp", type=_RANKS, default=1, help="Pipeline stages, each of which has layers of its own.")
@click.option("--measure", "measures", is_flag=True, help="Also run the engine for some seconds beside its bounds.")
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), help="SVG file for the roofline.")
@json_option
def plan(
    *,
    model: str,
    machine: str,
    context: int | None,
    batch: int,
    tp: int,
    ep: int,
    pp: int,
    measures: bool,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Show what MODEL costs on a machine, and where batching, speculation and splitting over ranks pay.

    MODEL is what `shoal serve --model` takes, or a config.json.  Times are bounds that nothing can beat.
    """  # fmt: skip
    from shoal.server.planner.costs import Split  # noqa: PLC0415
    from shoal.server.planner.measure import measure_steps  # noqa: PLC0415
    from shoal.server.planner.picture import draw  # noqa: PLC0415
    from shoal.server.planner.plan import make_plan  # noqa: PLC0415
    from shoal.server.planner.subject import place, read_shapes  # noqa: PLC0415

    if measures and machine != "auto":
        raise CommandError("plan", "--measure: only this machine can be measured, which is --machine auto")
    asked = Split(tp, ep, pp)
    try:
        subject = place(read_shapes(model), machine, context=context, asked=asked)
        subject, timed = measure_steps(model, subject, batch) if measures else (subject, [])
        found = make_plan(model, subject, batch=batch, asked=asked, timed=timed)
        if picture:
            picture.write_text(draw(found), encoding="utf-8")
    except ShoalError as error:
        raise CommandError("plan", error.message) from error
    except OSError as error:
        raise CommandError("plan", f"{error.filename}: {error.strerror}") from error
    if as_json:
        echo_json(found.as_json())
        return
    for title, rows in found.tables():
        show(title, rows)
