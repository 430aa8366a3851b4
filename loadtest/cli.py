"""The commands `shoal loadtest`, `simulate`, `profile`, `bench`, `explain` and `replay`."""

# ruff: noqa: PLC0415 (only the command that is called loads what it needs)

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import click

from shoal.clients.wire import DEFAULT_URL
from shoal.extras import install_command
from shoal.terminal import CommandError, echo_json, json_option, progress, show

Function = TypeVar("Function", bound=Callable[..., Any])

NEEDED = ("locust", "matplotlib", "scipy", "tqdm")
GENERATE_NEEDS = ("torch", "transformers")
COMPLAINTS_EXIT_CODE, CTRL_C_EXIT_CODE = 1, 130
A_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
SET_BY_US = ("model", "policy", "speculation", "method", "host", "port", "trace", "api-keys", "ssl-certfile")
DEFAULT_PROFILE_FOLDER = Path("shoal-profile")
A_NEW_FILE = click.Path(path_type=Path, dir_okay=False)
A_FOLDER = click.Path(path_type=Path, file_okay=False)
COUNT, POSITIVE = click.IntRange(min=1), click.FloatRange(0, 10**6, min_open=True)
MANY = click.IntRange(1, 100_000)
MOMENT: click.ParamType[Any] = click.FloatRange(0, 10**6)
_SHRINK = click.Choice([1, 2, 4, 8, 16, 32, 64])


def _several(one: click.ParamType[Any]) -> Callable[[str], tuple[Any, ...]]:
    """The type of an option of several values with commas between them; a repetition counts once."""
    return lambda text: tuple(dict.fromkeys(one.convert(word, None, None) for word in text.split(",")))


def _pairs(what: click.ParamType[Any]) -> Callable[[str], tuple[tuple[float, Any], ...]]:
    """The type of an option of moments, each with something: `12.5:3,20:1`."""

    def parse(text: str) -> tuple[tuple[float, Any], ...]:
        pairs = (word.partition(":") for word in text.split(","))
        return tuple((MOMENT.convert(time, None, None), what.convert(value, None, None)) for time, _, value in pairs)

    return parse


def _bounds(text: str) -> tuple[int, int]:
    count: click.ParamType[Any] = COUNT
    least, _, most = text.partition(":")
    return count.convert(least, None, None), count.convert(most, None, None)


def _load_options(command: Function) -> Function:
    """Options of what is compared, which commands share."""
    names, counts, rates = _several(click.STRING), _several(COUNT), _several(POSITIVE)
    for option in (
        click.option("--shrink", type=_SHRINK, default=1, help="Divides the lengths of a trace."),
        click.option("--replay", help="A saved workload, or a trace of Mooncake's or Azure's, instead of --workload."),
        click.option("--seed", type=int, default=0, help="Of workloads, arrivals and pauses."),
        click.option("--requests", "num_requests", type=COUNT, help="Number of requests of each workload."),
        click.option("--burstiness", type=POSITIVE, default=1.0, help="Of arrivals; 1 is a Poisson process."),
        click.option("--think-seconds", type=float, default=0.0, help="Mean pause of a user before a request."),
        click.option("--rate", "--rates", "rates", type=rates, metavar="R,...", help="Open loops, requests/s."),
        click.option("--users", type=counts, metavar="N,...", help="Closed loops of N users."),
        click.option("--workload", "workloads", type=names, metavar="NAME,...", help="Workloads, or all."),
        click.option("--policies", type=names, metavar="NAME,...", help="Or all; `shoal policies` lists them."),
    ):
        command = option(command)
    return command


def _check(ctx: click.Context, param: click.Parameter, options: tuple[str, ...]) -> tuple[str, ...]:
    for name in (option.partition("=")[0] for option in options):
        if name.startswith("--") and name.removeprefix("--").rpartition(".")[2] in SET_BY_US:
            raise click.BadParameter(f"{name} cannot stand after --: the command itself sets it")
    return options


_model = click.option(
    "--model", default="shoal-moe", show_default=True, help="Checkpoint folder, or a bundled model's name."
)
_server_options = click.argument(
    "options", nargs=-1, type=click.UNPROCESSED, metavar="[-- SERVER OPTIONS]", callback=_check
)


@click.command()
@_load_options
@click.option(
    "--speculation", type=_several(click.STRING), metavar="NAME,...", help="Methods: off, draft, mtp, self, suffix."
)
@click.option("--hugging-face", is_flag=True, help="And with transformers' generate on padded batches.")
@click.option(
    "--profile",
    "size",
    type=click.Choice(["fast", "full"]),
    default="fast",
    show_default=True,
    help="fast: 96 requests a workload, once; full: 256, twice, up to saturation, and every workload if none is named.",
)
@click.option("--repetitions", type=COUNT, help="How often everything is measured.")
@_model
@click.option("--ttft-slo-ms", type=POSITIVE, default=1000.0, show_default=True, help="Objective of goodput for TTFT.")
@click.option("--tpot-slo-ms", type=POSITIVE, default=100.0, show_default=True, help="Objective of goodput for TPOT.")
@click.option("--costs", help="Folder of a profile; without it, one is taken first.")
@click.option("--output", type=A_FOLDER, help="Folder for all that comes of it.")
@click.option("--resume", is_flag=True, help="Go on with the comparison in the folder, as it was asked for.")
@json_option
@_server_options
def loadtest(output: Path | None, resume: bool, as_json: bool, **asked: Any) -> None:
    """Compare servers under load: policies, with and without speculation.

    For each combination a server is started, warmed and put under load.  At the end there is a table, and report.html
    with its pictures.  Options after -- are passed to every server.
    """  # fmt: skip
    with _exit_codes("loadtest"):
        if asked["hugging_face"]:
            _require("loadtest", GENERATE_NEEDS, "train")
        from shoal.loadtest.plan import Plan, make_plan
        from shoal.loadtest.records import read_json
        from shoal.loadtest.study import PLAN_FILE, begin, conduct
        from shoal.scheduler.policies import POLICIES

        if resume and output is None:
            raise click.UsageError("--resume needs --output, the folder of the comparison that is to go on")
        folder = output or Path("loadtest-results") / datetime.now().strftime("%Y%m%d-%H%M%S")
        if resume:
            plan = read_json(folder / PLAN_FILE, Plan)
        else:
            plan = make_plan(POLICIES, command=shlex.join(["shoal", *sys.argv[1:]]), **asked)
            begin(plan, folder)
        click.echo(
            f"Everything is saved in {folder}; if this ends early, --output {folder} --resume goes on.", err=True
        )
        report = conduct(plan, folder)
        _show(report.cells, report.complaints, as_json=as_json, report=str(folder / "report.html"))
    if report.complaints:
        sys.exit(COMPLAINTS_EXIT_CODE)


@click.command()
@_load_options
@click.option("--costs", type=A_FOLDER, default=DEFAULT_PROFILE_FOLDER, show_default=True, help="Folder of a profile.")
@click.option("--replicas", type=click.IntRange(1, 10_000), help="Of a cluster, each an engine like the profile's.")
@click.option(
    "--router", "routers", type=_several(click.STRING), metavar="NAME,...", help="prefix, load, hash or pow2."
)
@click.option("--autoscale", type=_bounds, metavar="LEAST:MOST", help="Replicas come and go with the load.")
@click.option("--kill", "kills", type=_pairs(click.IntRange(min=0)), metavar="SECONDS:REPLICA,...", help="Deaths.")
@click.option("--add", "additions", type=_pairs(COUNT), metavar="SECONDS:COUNT,...", help="Further replicas.")
@click.option("--start-seconds", type=MOMENT, help="Until a replica that starts is ready; 10 if not given.")
@click.option(
    "--write", type=A_NEW_FILE, help="Write the requests as a trace and stop: Azure's if .csv, or Mooncake's."
)
@json_option
@_server_options
def simulate(
    costs: Path, as_json: bool, replicas: int | None, routers: tuple[str, ...] | None, write: Path | None, **asked: Any
) -> None:
    """Predict what `shoal loadtest` would measure, from a profile and without a server.

    With --replicas, a cluster of such servers is simulated. Options after -- change the limits and knobs of the
    scheduler.
    """  # fmt: skip
    with _exit_codes("simulate"):
        from shoal.loadtest.fleet import Fleet, fleet_table
        from shoal.loadtest.plan import make_plan
        from shoal.loadtest.rehearsal import rehearse, rehearse_fleets, write_trace
        from shoal.loadtest.twin import SJF_ORACLE
        from shoal.scheduler.policies import POLICIES

        names = ("autoscale", "kills", "additions", "start_seconds")
        changes = {name: value for name in names if (value := asked.pop(name)) is not None}
        if replicas is None and (changes or routers):
            raise click.UsageError("--router, --autoscale, --kill, --add and --start-seconds need --replicas")
        if (replicas or write) and not asked["policies"]:
            asked["policies"] = ("fcfs",)
        plan = make_plan([*POLICIES, SJF_ORACLE], **asked)
        if write:
            count = write_trace(plan, costs, write)
            echo_json({"trace": str(write), "requests": count}) if as_json else click.echo(f"{write}: {count} requests")
        elif replicas is None:
            _show(rehearse(plan, costs), (), as_json=as_json)
        else:
            fleets = [Fleet(replicas=replicas, router=router, **changes) for router in routers or ("prefix",)]
            found = rehearse_fleets(plan, costs, fleets)
            if as_json:
                echo_json(
                    [
                        figures | {"router": fleet.router, "policy": planned.setup.policy, "load": str(planned.load)}
                        for planned, fleet, figures in found
                    ]
                )
            else:
                show(f"{replicas} replicas", fleet_table(found))


@click.command()
@_model
@click.option("--requests", "num_requests", type=COUNT, default=256, show_default=True, help="Of each saved workload.")
@click.option("--seed", type=int, default=0, help="Of the workloads.")
@click.option("--output", type=A_FOLDER, default=DEFAULT_PROFILE_FOLDER, show_default=True, help="For the profile.")
@json_option
@_server_options
def profile(output: Path, as_json: bool, **asked: Any) -> None:
    """Measure what steps cost, for `shoal simulate`, in six short runs.

    Options after -- are passed to every server.
    """  # fmt: skip
    with _exit_codes("profile"):
        from shoal.loadtest.plan import Plan
        from shoal.loadtest.study import take_profile

        take_profile(Plan(**asked), output)
        file = f"{output}/profile.json"
        echo_json({"profile": file}) if as_json else click.echo(file)


@click.command()
@click.option("--url", envvar="SHOAL_URL", default=DEFAULT_URL, show_default=True, show_envvar=True, help="The server.")
@click.option("--api-key", envvar="SHOAL_API_KEY", show_envvar=True, help="Sent as a bearer token.")
@click.option("--model", help="Name of the model; the first that the server names if not given.")
@click.option("--requests", "num_requests", type=MANY, default=64, show_default=True, help="Number of requests.")
@click.option("--concurrency", type=click.IntRange(1, 4096), default=8, show_default=True, help="At once.")
@click.option(
    "--rate",
    type=click.FloatRange(0, 10_000, min_open=True),
    help="Requests/s at random times (Poisson), in place of --concurrency.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1, 1_000_000),
    default=128,
    show_default=True,
    help="Of a prompt, nearly; no two prompts begin alike.",
)
@click.option("--max-tokens", type=MANY, default=64, show_default=True, help="Most tokens of an answer.")
@click.option("--endpoint", type=click.Choice(["chat", "completions"]), default="chat", show_default=True)
@click.option("--timeout", type=click.FloatRange(1, 86_400), default=600.0, show_default=True, help="Longest silence.")
@click.option("--seed", type=int, default=0, help="Of prompts and times.")
@json_option
def bench(as_json: bool, **asked: Any) -> None:
    """Measure how fast a server with OpenAI's API answers.

    Answers are streamed.  Exit code 1 says that requests failed.
    """
    import asyncio

    from shoal.clients import ClientError
    from shoal.loadtest.bench import Asked, Measured, measure, show_measured

    try:
        with progress("requests", asked["num_requests"], is_shown=not as_json) as advance:
            measured = asyncio.run(measure(Asked(**asked), advance))
    except ClientError as error:
        raise CommandError("bench", " ".join(error.message.split())) from error
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        sys.exit(CTRL_C_EXIT_CODE)
    if as_json:
        shown = {name: value for name, value in asked.items() if name != "api_key"}
        echo_json(shown | {name: getattr(measured, name) for name in Measured.__struct_fields__})
    else:
        show_measured(asked["url"], measured)
    if measured.errors:
        sys.exit(COMPLAINTS_EXIT_CODE)


@click.command()
@click.argument("trace", type=A_FILE)
@click.argument("request")
@click.option("--policy", "policies", type=_several(click.STRING), metavar="NAME,...", help="Or all others.")
@json_option
def explain(trace: Path, request: str, policies: tuple[str, ...] | None, as_json: bool) -> None:
    """Explain how REQUEST was served, from the TRACE that `shoal serve --trace` wrote.

    REQUEST is its id, or the beginning of it, or "slowest". At the end stands what the digital twin says of it under
    other policies.
    """
    with _exit_codes("explain"):
        import msgspec

        from shoal.loadtest.explain import described
        from shoal.loadtest.explain import explain as explain_request
        from shoal.loadtest.trace import read_whole_trace

        explained = explain_request(read_whole_trace(trace), request, policies or ())
        echo_json(msgspec.to_builtins(explained)) if as_json else click.echo("\n".join(described(explained)))


@click.command()
@click.argument("response", type=A_FILE)
@click.option("--url", help="Of a server that is to answer; without it, one is started.")
@click.option("--api-key", envvar="SHOAL_API_KEY", show_envvar=True, help="Sent as a bearer token.")
@click.option("--model", help="For a server that is started; without it, the model of the receipt.")
@json_option
@_server_options
def replay(
    response: Path, *, url: str | None, api_key: str | None, model: str | None, as_json: bool, options: tuple[str, ...]
) -> None:
    """Generate the answer in the file RESPONSE again, as its receipt says, and compare every token.

    The exit code is 0 if all are the same, 1 if they are not, and 2 if that cannot be found out. Options after -- are
    passed to the server that is started.
    """
    with _exit_codes("replay", needed=()), ExitStack() as stack:
        import msgspec

        from shoal.clients import ShoalClient
        from shoal.loadtest.replay import read_answer, server_settings
        from shoal.loadtest.replay import replay as replay_answer
        from shoal.testing import ServerProcess
        from shoal.testing.server import serve_options

        stored = read_answer(response)
        if url is None:
            settings = {"model": model or stored.receipt.model.name, **server_settings(stored.receipt)}
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="shoal-replay-")))
            server = ServerProcess([*serve_options(settings), *options], folder / "log")
            url = stack.enter_context(server).url
        client = stack.enter_context(ShoalClient(url, api_key=api_key))
        replayed = replay_answer(stored, client)
        if as_json:
            echo_json(msgspec.to_builtins(replayed))
        else:
            for line in (*replayed.notes, *replayed.differences):
                click.echo(line)
            verdict = "the same" if replayed.is_same else "not the same"
            click.echo(f"{verdict}: {replayed.num_tokens} tokens in {replayed.num_choices} choices")
    sys.exit(0 if replayed.is_same else COMPLAINTS_EXIT_CODE)


def _show(cells: Any, complaints: Sequence[str], *, as_json: bool, **further: str) -> None:
    """Tables for people, what must not be overlooked, and one line of JSON."""
    import msgspec

    from shoal.loadtest.report import terminal_tables
    from shoal.loadtest.study import summaries

    if not as_json:
        for title, rows in terminal_tables(cells):
            show(title, rows)
        click.echo()
        for name, value in further.items():
            click.echo(f"{name}: {value}")
    for complaint in complaints:
        click.echo(f"! {complaint}", err=True)
    click.echo(msgspec.json.encode({**further, "complaints": complaints, "results": summaries(cells)}))


def _require(command: str, packages: Sequence[str], extra: str) -> None:
    if missing := [name for name in packages if find_spec(name) is None]:
        raise CommandError(command, f"{', '.join(missing)} not installed: run `{install_command(extra)}`")


@contextmanager
def _exit_codes(command: str, needed: Sequence[str] | None = None) -> Iterator[None]:
    """Exit with 2 and one line on stderr after an error, with 130 after Ctrl-C; SIGTERM leaves no server behind."""
    _require(command, NEEDED if needed is None else needed, "loadtest")
    from shoal.clients.errors import ClientError
    from shoal.scheduler.errors import ShoalError

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    except (ShoalError, ClientError) as error:
        raise CommandError(command, str(error)) from error
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        sys.exit(CTRL_C_EXIT_CODE)
