"""The commands `shoal loadtest`, `shoal simulate` and `shoal profile`."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click

from shoal.extras import install_command

Function = TypeVar("Function", bound=Callable[..., Any])
Number = TypeVar("Number", int, float)

NEEDED = ("locust", "matplotlib", "tqdm")
USAGE_EXIT_CODE, COMPLAINTS_EXIT_CODE, CTRL_C_EXIT_CODE = 2, 1, 130
DEFAULT_PROFILE_FOLDER = Path("shoal-profile")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _integers(text: str) -> tuple[int, ...]:
    return _numbers(text, int)


def _reals(text: str) -> tuple[float, ...]:
    return _numbers(text, float)


def _numbers(text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    try:
        return tuple(map(kind, text.split(",")))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no number, nor several with commas between them") from None


def _load_options(function: Function) -> Function:
    """What is sent, and how: the options that measurements and simulations share."""
    options = [
        click.option("--policies", type=_names, metavar="NAME,...", help="Or all; `shoal policies` lists them."),
        click.option("--workload", "workloads", type=_names, metavar="NAME,...", help="Workloads, or all."),
        click.option(
            "--users",
            type=_integers,
            metavar="N,...",
            help="Closed loops of so many users.",
        ),
        click.option(
            "--rate", "--rates", "rates", type=_reals, metavar="R,...", help="Open loops of so many requests a second."
        ),
        click.option("--think-seconds", type=float, default=0.0, help="What users pause on average."),
        click.option("--burstiness", type=float, default=1.0, help="Of arrivals; 1 is a Poisson process."),
        click.option("--requests", "num_requests", type=int, help="How many requests each workload has."),
        click.option("--seed", type=int, default=0, help="Of workloads, arrivals and pauses."),
        click.option("--replay", type=click.Path(path_type=Path), help="A saved workload, instead of --workload."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


_server_options = click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- SERVER OPTIONS]")


@click.command()
@_load_options
@click.option("--speculation", type=_names, metavar="NAME,...", help="Methods: off, draft, ngram, self.")
@click.option(
    "--profile",
    "size",
    type=click.Choice(["fast", "full"]),
    default="fast",
    show_default=True,
    help="fast: under 3 minutes; full: up to saturation, and every workload if none is named.",
)
@click.option("--repetitions", type=int, help="How often everything is measured.")
@click.option("--model", default="shoal-moe", show_default=True, help="Checkpoint folder, or a bundled model's name.")
@click.option("--ttft-slo-ms", type=float, default=1000.0, show_default=True, help="What goodput asks of TTFT.")
@click.option("--tpot-slo-ms", type=float, default=100.0, show_default=True, help="What goodput asks of TPOT.")
@click.option("--costs", type=click.Path(path_type=Path), help="Folder of a profile; without, one is taken first.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="Folder for all that comes of it.")
@click.option("--resume", is_flag=True, help="Go on with the comparison in the folder.")
@_server_options
def loadtest(output: Path | None, resume: bool, options: tuple[str, ...], **asked: Any) -> None:
    """Compare servers under load: policies, with and without speculation.

    For each combination a server is started, warmed and put under load; at the end stand a table, and report.html with
    its pictures.  What stands after -- is passed to every server.
    """  # fmt: skip
    with _exit_codes("loadtest"):
        from shoal.loadtest.errors import LoadTestError  # noqa: PLC0415
        from shoal.loadtest.planning import plan_comparison  # noqa: PLC0415 (only the command that is called loads what it needs)
        from shoal.loadtest.study import conduct  # noqa: PLC0415

        if resume and output is None:
            raise LoadTestError("--resume needs --output, the folder of the comparison that is to go on")
        plan = plan_comparison(options=options, **asked)
        folder = output or Path("loadtest-results") / datetime.now().strftime("%Y%m%d-%H%M%S")
        command = shlex.join(["shoal", *sys.argv[1:]])
        click.echo(
            f"Everything is saved in {folder}; if this ends early, --output {folder} --resume goes on.", err=True
        )
        study = conduct(plan, folder, options=options, is_resumed=resume, command=command)
        _show(study.cells, study.complaints, report=str(study.report))
    if study.complaints:
        sys.exit(COMPLAINTS_EXIT_CODE)


@click.command()
@_load_options
@click.option(
    "--costs",
    type=click.Path(path_type=Path),
    default=DEFAULT_PROFILE_FOLDER,
    show_default=True,
    help="Folder of a profile.",
)
@_server_options
def simulate(costs: Path, options: tuple[str, ...], **asked: Any) -> None:
    """Predict what `shoal loadtest` would measure, from a profile and without a server.

    What stands after -- changes the limits and knobs of the scheduler.
    """  # fmt: skip
    with _exit_codes("simulate"):
        from shoal.loadtest.planning import plan_simulation  # noqa: PLC0415
        from shoal.loadtest.study import rehearse  # noqa: PLC0415

        _show(rehearse(plan_simulation(options=options, **asked), costs), ())


@click.command()
@click.option("--model", default="shoal-moe", show_default=True, help="Checkpoint folder, or a bundled model's name.")
@click.option(
    "--requests",
    "num_requests",
    type=int,
    default=256,
    show_default=True,
    help="How many requests each workload has that is saved with the profile.",
)
@click.option("--seed", type=int, default=0, help="Of the workloads.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_PROFILE_FOLDER,
    show_default=True,
    help="Folder for the profile.",
)
@_server_options
def profile(output: Path, options: tuple[str, ...], **asked: Any) -> None:
    """Measure what steps cost, for `shoal simulate`: a minute of short runs.

    What stands after -- is passed to every server.
    """  # fmt: skip
    with _exit_codes("profile"):
        from shoal.loadtest.planning import plan_profile  # noqa: PLC0415
        from shoal.loadtest.study import profile_servers  # noqa: PLC0415

        profile_servers(output, plan_profile(options=options, **asked), options=options)
        click.echo(f"{output}/profile.json")


def _show(cells: Any, complaints: Any, **further: str) -> None:
    """Tables for people, what must not be overlooked, and one line of JSON."""
    from shoal.loadtest.storage import to_json  # noqa: PLC0415
    from shoal.loadtest.study import figures  # noqa: PLC0415
    from shoal.loadtest.table import tables  # noqa: PLC0415

    for table in tables(cells):
        click.echo(f"\n{table}")
    click.echo()
    for complaint in complaints:
        click.echo(f"! {complaint}", err=True)
    for name, value in further.items():
        click.echo(f"{name}: {value}")
    click.echo(to_json({**further, "complaints": complaints, "results": figures(cells)}))


@contextmanager
def _exit_codes(command: str) -> Iterator[None]:
    """Exit with 2 and one line on stderr after an error, with 130 after Ctrl-C; SIGTERM leaves no server behind."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        _fail(command, f"{', '.join(missing)} not installed: run `{install_command('loadtest')}`")
    from shoal.loadtest.errors import LoadTestError  # noqa: PLC0415
    from shoal.scheduler.errors import ShoalError  # noqa: PLC0415

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    except (LoadTestError, ShoalError) as error:
        _fail(command, str(error))
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        sys.exit(CTRL_C_EXIT_CODE)


def _fail(command: str, message: str) -> None:
    click.echo(f"shoal {command}: {message}", err=True)
    sys.exit(USAGE_EXIT_CODE)
