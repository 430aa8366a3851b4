"""The commands `shoal serve`, `shoal rank`, `shoal models`, `shoal inspect` and `shoal policies`."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from shoal.extras import install_command
from shoal.scheduler.errors import ShoalError
from shoal.scheduler.policies import describe_policies
from shoal.server.descriptors import open_standard_files, raise_limit
from shoal.server.settings import DEFAULT_MODEL
from shoal.server.sources import SettingsCommand, hub_cache, load_settings
from shoal.terminal import CommandError, echo_json, json_option, show

logger = logging.getLogger("shoal")

REFUSED = 2  # the exit code of a rank that cannot join, and need not try again


class _Serve(SettingsCommand):
    """Hands its arguments on as they are, because settings come from more places than the command line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.params["arguments"] = list(args)
        return []

    def invoke(self, ctx: click.Context) -> Any:
        serve(ctx.params["arguments"])


def serve(arguments: list[str]) -> None:
    """Serve until a signal ends it.

    Raises:
        CommandError: that cannot be; it has a line for each fault.
    """
    open_standard_files()
    gc.disable()  # what is loaded at the start stays, and collections would look at it many times
    try:
        settings = load_settings(arguments)
        raise_limit()
        import uvloop  # noqa: PLC0415 (what follows takes longer to load than --help takes to answer)

        from shoal.server.logs import set_up_logs  # noqa: PLC0415
        from shoal.server.start import start  # noqa: PLC0415

        set_up_logs(settings.server)
        if any(argument.partition("=")[0] in ("--api-keys", "--server.api-keys") for argument in arguments):
            logger.warning("everybody on this machine can read the command line: give API keys by --api-keys-file")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(start(settings))
    except ShoalError as error:
        raise CommandError("serve", error.message) from error


serve_command = _Serve("serve")


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path, exists=True), metavar="[FOLDER]...")
@json_option
def models(folders: Sequence[Path], as_json: bool) -> None:
    """List the models that can be served, and say why others cannot.

    They are those that Shoal brings, those in the cache of Hugging Face's tools, and those in each FOLDER: checkpoint
    folders and .gguf files, up to four folders deep.  Only headers are read.
    """  # fmt: skip
    from shoal.server.inventory import find_models  # noqa: PLC0415

    found = find_models(hub_cache(), folders)
    if as_json:
        listed = [{"place": place, **model.as_json()} for place, own in found.items() for model in own]
        echo_json({"models": listed})
        return
    for place, own in found.items():
        if own:
            show(place, [model.as_row() for model in own])
        else:
            click.echo(f"\n{place}: none")
    click.echo("\nTo serve one: shoal serve --model MODEL")


@click.command()
@click.argument("model")
@json_option
def inspect(model: str, as_json: bool) -> None:
    """Show what MODEL is, as far as its headers say it, and what will serve it.

    MODEL is what `shoal serve --model` takes.  The settings are those of `shoal serve`, by file and environment.
    """
    from shoal.server.inspection import inspect_model  # noqa: PLC0415

    try:
        inspection = inspect_model(load_settings(["--model", model]))
    except ShoalError as error:
        raise CommandError("inspect", error.message) from error
    if as_json:
        echo_json(inspection.as_json())
        return
    for title, rows in inspection.tables():
        show(title, rows)


@click.command()
@json_option
def policies(as_json: bool) -> None:
    """List the scheduling policies."""
    described = describe_policies()
    if as_json:
        echo_json({"policies": described})
        return
    width = max(map(len, described))
    for name, line in described.items():
        click.echo(f"{name:{width}}  {line}")


@click.command("rank")
@click.argument("address", metavar="HOST:PORT")
@click.option("--model", default=DEFAULT_MODEL, help="As of `shoal serve`; the same checkpoint, wherever it lies here.")
@click.option("--device", default="cpu", help="cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; one for each core if not given.")
@click.option(
    "--secret-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the secret that the engine has in its parallel_secret_file.",
)
@click.option("--wait", "seconds", type=click.FloatRange(min=0), default=60.0, help="Seconds to wait for an engine.")
def rank_command(
    address: str, model: str, device: str, threads: int | None, *, secret_file: Path | None, seconds: float
) -> None:
    """Compute a part of the model of the engine at HOST:PORT, which is its `--parallel-address`.

    When that engine ends, its successor is waited for.
    """  # fmt: skip
    if find_spec("torch") is None:
        raise CommandError("rank", f"needs torch, which is not installed: run `{install_command('torch')}`")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # which ends the process below too
    from shoal.server.engine.rank_secret import read_secret  # noqa: PLC0415 (numpy takes a while to load)

    try:
        secret = read_secret(secret_file)
    except ShoalError as error:
        raise CommandError("rank", error.message) from error
    command = [sys.executable, "-P", "-m", "shoal.server.engine.rank", address, model, device]
    while True:
        done = subprocess.run([*command, str(threads or 0), str(seconds)], input=secret, check=False)
        if done.returncode == REFUSED:
            sys.exit(REFUSED)
