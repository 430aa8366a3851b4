"""The commands `shoal serve` and `shoal policies`."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import click

from shoal.scheduler.errors import ShoalError
from shoal.scheduler.policies import describe_policies
from shoal.server.descriptors import open_standard_files, raise_limit
from shoal.server.sources import SettingsCommand, load_settings

logger = logging.getLogger("shoal")


class _Serve(SettingsCommand):
    """Hands its arguments on as they are, because settings come from more places than the command line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.params["arguments"] = list(args)
        return []

    def invoke(self, ctx: click.Context) -> Any:
        serve(ctx.params["arguments"])


def serve(arguments: list[str]) -> None:
    """Serve until a signal ends it; exit with code 2 and a line for each fault if that cannot be."""
    open_standard_files()
    try:
        settings = load_settings(arguments)
        raise_limit()
        import uvloop  # noqa: PLC0415 (what follows takes longer to load than --help takes to answer)

        from shoal.server.logs import set_up_logs  # noqa: PLC0415
        from shoal.server.serve import serve as run  # noqa: PLC0415

        set_up_logs(settings.server)
        if any(argument.partition("=")[0] in ("--api-keys", "--server.api-keys") for argument in arguments):
            logger.warning("everybody on this machine can read the command line: give API keys by --api-keys-file")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(settings))
    except ShoalError as error:
        for line in error.message.splitlines():
            print(f"shoal serve: {line}", file=sys.stderr)
        sys.exit(2)


serve_command = _Serve("serve")


@click.command()
def policies() -> None:
    """List the scheduling policies."""
    described = describe_policies()
    width = max(map(len, described))
    for name, line in described.items():
        click.echo(f"{name:{width}}  {line}")
