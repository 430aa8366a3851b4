"""The `shoal` command.  Only the room of the subcommand that is called is loaded."""

from __future__ import annotations

from importlib import import_module

import click

_COMMANDS = {
    "chat": ("shoal.clients.cli", "chat"),
    "complete": ("shoal.clients.cli", "complete"),
    "loadtest": ("shoal.loadtest.cli", "loadtest"),
    "policies": ("shoal.server.cli", "policies"),
    "profile": ("shoal.loadtest.cli", "profile"),
    "serve": ("shoal.server.cli", "serve_command"),
    "simulate": ("shoal.loadtest.cli", "simulate"),
}


class _LazyCommands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(module), name)
        return command


@click.group(cls=_LazyCommands)
@click.version_option(package_name="shoal")
def main() -> None:
    """A miniature LLM inference server."""
