"""The `shoal` command.  Only the room of the subcommand that is called is loaded."""

from __future__ import annotations

from importlib import import_module

import click
from click.shell_completion import get_completion_class

from shoal.terminal import Commands

_COMMANDS = {
    "bench": ("shoal.loadtest.cli", "bench"),
    "chat": ("shoal.clients.cli", "chat"),
    "cluster": ("shoal.cluster.cli", "cluster"),
    "complete": ("shoal.clients.cli", "complete"),
    "completion": ("shoal.cli", "completion"),
    "explain": ("shoal.loadtest.cli", "explain"),
    "inspect": ("shoal.server.cli", "inspect"),
    "loadtest": ("shoal.loadtest.cli", "loadtest"),
    "models": ("shoal.server.cli", "models"),
    "plan": ("shoal.server.planner.cli", "plan"),
    "policies": ("shoal.server.cli", "policies"),
    "profile": ("shoal.loadtest.cli", "profile"),
    "rank": ("shoal.server.cli", "rank_command"),
    "replay": ("shoal.loadtest.cli", "replay"),
    "serve": ("shoal.server.cli", "serve_command"),
    "simulate": ("shoal.loadtest.cli", "simulate"),
}


class _LazyCommands(Commands):
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


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands and options in a shell.

    For bash, this line belongs into ~/.bashrc: eval "$(shoal completion bash)"
    """
    completer = get_completion_class(shell)
    assert completer is not None
    click.echo(completer(main, {}, "shoal", "_SHOAL_COMPLETE").source())
