"""What the commands have in common on a terminal: tables, help in colour, and output and errors as JSON.

Without a terminal there is no colour and no fitting to a width; NO_COLOR is obeyed.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import IO, Any

import click

NOTHING = "–"  # noqa: RUF001 -- the dash of an empty cell
_NUMBER = re.compile(rf"[-+]?\d\S*( \w+)?|{NOTHING}|")
_WIDE = 10_000  # columns, where no terminal limits them

json_option = click.option("--json", "as_json", is_flag=True, help="One line of JSON in place of all else; errors too.")


def show(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows with equal keys as a table; columns of numbers stand on the right, and None is a dash.

    Sentences are broken to fit the terminal; no number or path is.
    """
    # They take 35 ms to load, which most commands need not wait for.
    from rich.console import Console  # noqa: PLC0415
    from rich.measure import Measurement  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    cells = [[cell(value) for value in row.values()] for row in rows]
    for name, column in zip(rows[0], zip(*cells, strict=True), strict=True):
        is_number = all(map(_NUMBER.fullmatch, column))
        table.add_column(Text(name), justify="right" if is_number else "left")
    for row in cells:
        table.add_row(*map(Text, row))
    console = Console(width=None if sys.stdout.isatty() else _WIDE)
    console.width = max(console.width, Measurement.get(console, console.options, table).minimum)
    console.print(Text(f"\n{title}", style="bold"), table, sep="\n")


def cell(value: object) -> str:
    """The text of a value in a table: numbers with three digits, a dash for None."""
    if value is None:
        return NOTHING
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def in_words(number: float | None, unit: str = "") -> str | None:
    """A number with three digits and a prefix for thousands."""
    if number is None:
        return None
    prefixes: Sequence[tuple[float, str]] = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    size, prefix = next((each for each in prefixes if number >= each[0]), (1.0, ""))
    return f"{number / size:.3g} {prefix}{unit}".rstrip()


@contextmanager
def progress(what: str, total: int, *, is_shown: bool) -> Iterator[Callable[[], None]]:
    """Gives what is to be called when one of `total` is done; a bar on standard error shows them, on a terminal."""
    if not (is_shown and sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import MofNCompleteColumn, Progress  # noqa: PLC0415

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def echo_json(value: object, *, err: bool = False) -> None:
    """Print a value as one line of JSON."""
    click.echo(json.dumps(value, ensure_ascii=False), err=err)


class CommandError(click.ClickException):
    """Ends `shoal COMMAND` with exit code 2, and `shoal COMMAND: ...` on standard error for each line of a message."""

    exit_code = 2

    def __init__(self, command: str, message: str) -> None:
        super().__init__(message)
        self._command = command

    def show(self, file: IO[Any] | None = None) -> None:
        for line in self.message.splitlines():
            click.echo(f"shoal {self._command}: {line}", err=True)


class _Help(click.HelpFormatter):
    """Headings and options in colour; click leaves colours out where there is no terminal."""

    def write_heading(self, heading: str) -> None:
        super().write_heading(click.style(heading, bold=True))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl([(click.style(name, fg="cyan"), text) for name, text in rows], col_max, col_spacing)


class ColourContext(click.Context):
    """Has help in colour, unless NO_COLOR is set."""

    formatter_class = _Help

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if os.environ.get("NO_COLOR"):
            self.color = False


class Commands(click.Group):
    """A group whose commands have help in colour, and errors as JSON if they are asked for JSON."""

    context_class = ColourContext

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            command.context_class = ColourContext
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        words = [*takewhile(lambda word: word != "--", ctx.args)]
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            if "--json" not in words:
                raise
            echo_json({"error": _as_json(error)}, err=True)
            raise click.exceptions.Exit(error.exit_code) from None


def _as_json(error: click.ClickException) -> dict[str, str | None]:
    """An error with the name of what was raised first, and the setting or field that is at fault."""
    cause = error.__cause__ or error
    return {
        "type": type(cause).__name__,
        "message": error.format_message(),
        "param": getattr(cause, "param", None) if error.__cause__ else None,
    }
