"""The commands `shoal loadtest`, `shoal simulate` and `shoal profile`."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click

from shoal.extras import install_command

Function = TypeVar("Function", bound=Callable[..., Any])

NEEDED = ("locust", "matplotlib", "msgspec", "scipy", "tqdm")
USAGE_EXIT_CODE, COMPLAINTS_EXIT_CODE, CTRL_C_EXIT_CODE = 2, 1, 130
DEFAULT_PROFILE_FOLDER = Path("shoal-profile")
A_PATH, A_FOLDER = click.Path(path_type=Path), click.Path(path_type=Path, file_okay=False)


def _several(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """The type of an option of several values with commas between them."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(map(kind, text.split(",")))
        except ValueError:
            raise click.BadParameter(f"{text!r} is no number, nor several with commas between them") from None

    return read


def _options(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Options that commands share."""

    def add(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return add


_load_options = _options(
    click.option("--policies", type=_several(str), metavar="NAME,...", help="Or all; `shoal policies` lists them."),
    click.option("--workload", "workloads", type=_several(str), metavar="NAME,...", help="Workloads, or all."),
    click.option("--users", type=_several(int), metavar="N,...", help="Closed loops of N users."),
    click.option("--rate", "--rates", "rates", type=_several(float), metavar="R,...", help="Open loops, requests/s."),
    click.option("--think-seconds", type=float, default=0.0, help="Mean pause of a user before a request."),
    click.option("--burstiness", type=float, default=1.0, help="Of arrivals; 1 is a Poisson process."),
    click.option("--requests", "num_requests", type=int, help="Number of requests of each workload."),
    click.option("--seed", type=int, default=0, help="Of workloads, arrivals and pauses."),
    click.option("--replay", type=A_PATH, help="A saved workload, instead of --workload."),
)
_model = click.option(
    "--model", default="shoal-moe", show_default=True, help="Checkpoint folder, or a bundled model's name."
)
_server_options = click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- SERVER OPTIONS]")


@click.command()
@_load_options
@click.option("--speculation", type=_several(str), metavar="NAME,...", help="Methods: off, draft, ngram, self.")
@click.option(
    "--profile",
    "size",
    type=click.Choice(["fast", "full"]),
    default="fast",
    show_default=True,
    help="fast: under 3 minutes; full: up to saturation, and every workload if none is named.",
)
@click.option("--repetitions", type=int, help="How often everything is measured.")
@_model
@click.option("--ttft-slo-ms", type=float, default=1000.0, show_default=True, help="Objective of goodput for TTFT.")
@click.option("--tpot-slo-ms", type=float, default=100.0, show_default=True, help="Objective of goodput for TPOT.")
@click.option("--costs", type=A_PATH, help="Folder of a profile; without it, one is taken first.")
@click.option("--output", type=A_FOLDER, help="Folder for all that comes of it.")
@click.option("--resume", is_flag=True, help="Go on with the comparison in the folder, as it was asked for.")
@_server_options
def loadtest(output: Path | None, resume: bool, **asked: Any) -> None:
    """Compare servers under load: policies, with and without speculation.

    For each combination a server is started, warmed and put under load.  At the end there is a table, and report.html
    with its pictures.  What stands after -- is passed to every server.
    """  # fmt: skip
    with _exit_codes("loadtest"):
        from shoal.loadtest.plan import Asked, make_plan  # noqa: PLC0415 (only the command that is called loads what it needs)
        from shoal.loadtest.records import LoadTestError  # noqa: PLC0415
        from shoal.loadtest.study import conduct, open_folder  # noqa: PLC0415
        from shoal.scheduler.policies import POLICIES  # noqa: PLC0415

        if resume and output is None:
            raise LoadTestError("--resume needs --output, the folder of the comparison that is to go on")
        folder = output or Path("loadtest-results") / datetime.now().strftime("%Y%m%d-%H%M%S")
        asked["command"] = shlex.join(["shoal", *sys.argv[1:]])
        plan = open_folder(folder, None if resume else make_plan(Asked(**asked), POLICIES))
        click.echo(
            f"Everything is saved in {folder}; if this ends early, --output {folder} --resume goes on.", err=True
        )
        report = conduct(plan, folder)
        _show(report.cells, report.complaints, report=str(folder / "report.html"))
    if report.complaints:
        sys.exit(COMPLAINTS_EXIT_CODE)


@click.command()
@_load_options
@click.option("--costs", type=A_PATH, default=DEFAULT_PROFILE_FOLDER, show_default=True, help="Folder of a profile.")
@_server_options
def simulate(costs: Path, **asked: Any) -> None:
    """Predict what `shoal loadtest` would measure, from a profile and without a server.

    What stands after -- changes the limits and knobs of the scheduler.
    """  # fmt: skip
    with _exit_codes("simulate"):
        from shoal.loadtest.plan import Asked, make_plan  # noqa: PLC0415
        from shoal.loadtest.study import rehearse  # noqa: PLC0415
        from shoal.loadtest.twin import SJF_ORACLE  # noqa: PLC0415
        from shoal.scheduler.policies import POLICIES  # noqa: PLC0415

        _show(rehearse(make_plan(Asked(**asked), [*POLICIES, SJF_ORACLE]), costs), ())


@click.command()
@_model
@click.option("--requests", "num_requests", type=int, default=256, show_default=True, help="Of each saved workload.")
@click.option("--seed", type=int, default=0, help="Of the workloads.")
@click.option("--output", type=A_FOLDER, default=DEFAULT_PROFILE_FOLDER, show_default=True, help="For the profile.")
@_server_options
def profile(output: Path, **asked: Any) -> None:
    """Measure what steps cost, for `shoal simulate`: a minute of short runs.

    What stands after -- is passed to every server.
    """  # fmt: skip
    with _exit_codes("profile"):
        from shoal.loadtest.plan import Asked, make_plan  # noqa: PLC0415
        from shoal.loadtest.study import take_profile  # noqa: PLC0415

        take_profile(make_plan(Asked(workloads=("all",), policies=("fcfs",), **asked), ("fcfs",)), output)
        click.echo(f"{output}/profile.json")


def _show(cells: Any, complaints: Sequence[str], **further: str) -> None:
    """Tables for people, what must not be overlooked, and one line of JSON."""
    import msgspec  # noqa: PLC0415

    from shoal.loadtest.report import terminal_tables  # noqa: PLC0415
    from shoal.loadtest.study import summaries  # noqa: PLC0415

    for table in terminal_tables(cells):
        click.echo(f"\n{table}")
    click.echo()
    for complaint in complaints:
        click.echo(f"! {complaint}", err=True)
    for name, value in further.items():
        click.echo(f"{name}: {value}")
    click.echo(msgspec.json.encode({**further, "complaints": complaints, "results": summaries(cells)}))


@contextmanager
def _exit_codes(command: str) -> Iterator[None]:
    """Exit with 2 and one line on stderr after an error, with 130 after Ctrl-C; SIGTERM leaves no server behind."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        _fail(command, f"{', '.join(missing)} not installed: run `{install_command('loadtest')}`")
    from shoal.loadtest.records import LoadTestError  # noqa: PLC0415
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
