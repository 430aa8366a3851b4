"""The `shoal` command.  Each room registers its own commands; only the one that is called is loaded."""

from __future__ import annotations

import asyncio
import logging
import sys
from importlib.metadata import entry_points

import click


class _LazyCommands(click.Group):
    """Commands by entry point, so that `shoal chat` need not load what `shoal serve` does, and the other way round."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(point.name for point in entry_points(group="shoal.commands"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for point in entry_points(group="shoal.commands", name=cmd_name):
            command: click.Command = point.load()
            return command
        return None


@click.group(cls=_LazyCommands)
@click.version_option(package_name="shoal")
def main() -> None:
    """A miniature LLM inference server."""


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """Serve a model over HTTP (`shoal serve --help` lists all settings)."""
    import uvloop  # noqa: PLC0415 (only this command needs what follows)

    from shoal.scheduler.errors import ShoalError  # noqa: PLC0415
    from shoal.server.serve import serve as run  # noqa: PLC0415
    from shoal.server.settings import load_settings  # noqa: PLC0415

    try:
        settings = load_settings(list(arguments))
        logging.basicConfig(
            level=settings.server.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(settings))
    except ShoalError as error:
        print(f"shoal serve: {error.message}", file=sys.stderr)
        sys.exit(2)


@click.command()
def policies() -> None:
    """List the scheduling policies."""
    from shoal.scheduler.policies import describe_policies  # noqa: PLC0415

    described = describe_policies()
    width = max(map(len, described))
    for name, line in described.items():
        click.echo(f"{name:{width}}  {line}")


if __name__ == "__main__":
    main()
