"""The conversation of `shoal chat`."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

import click

from shoal.clients.errors import ApiError, ClientError
from shoal.clients.live import LiveAnswer, explain
from shoal.clients.types import ChatOptions, Message

if TYPE_CHECKING:
    from shoal.clients.client import ShoalClient

HELP = """\
/help           show this
/reset          forget the conversation (the system message stays)
/system TEXT    set the system message; without TEXT, remove it
/quit           end; so does Ctrl-D
Ctrl-C stops the answer that is being given."""


class Repl:
    """Reads one line, answers it in the light of all before, and again.

    In a terminal, errors and Ctrl-C end a turn.  In a pipe each line is a turn too, but the first error ends all.
    """

    def __init__(self, client: ShoalClient, options: ChatOptions, system: str | None) -> None:
        self._client = client
        self._options = options
        self._system = system
        self._history: list[Message] = []
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        """Go on until the input ends or /quit.

        Raises:
            ClientError, KeyboardInterrupt: only in a pipe.
        """
        if self._interactive:
            _start_line_editing()
            click.secho("/help lists the commands, Ctrl-D ends.", dim=True, err=True)
        while True:
            try:
                self._handle(input("> " if self._interactive else "").strip())
            except EOFError:
                self._end_line()
                return
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._end_line()
            except ClientError as error:
                if not self._interactive:
                    raise
                click.secho(f"Error: {_explain(error)}", fg="red", err=True)

    def _end_line(self) -> None:
        """Leave the line in which the terminal shows ^C or the prompt."""
        if self._interactive:
            click.echo(err=True)

    def _handle(self, line: str) -> None:
        if line.startswith("/"):
            self._command(line)
        elif line:
            self._answer(line)

    def _command(self, line: str) -> None:
        name, _, text = line.partition(" ")
        match name:
            case "/help":
                click.echo(HELP, err=True)
            case "/reset":
                self._history.clear()
            case "/system":
                self._system = text.strip() or None
            case "/quit":
                raise click.exceptions.Exit(0)
            case _:
                click.echo(f"There is no command {name}; /help lists them.", err=True)

    def _answer(self, text: str) -> None:
        """Take one turn.  What was seen of a stopped answer is remembered; a turn that failed leaves no trace."""
        question = Message(role="user", content=text)
        answer = LiveAnswer()
        try:
            with self._client.stream_chat([*self._context(), question], **self._options) as stream:
                answer.show(stream, end_line=True)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            if answer.text:
                self._remember(question, answer)
            click.secho("[stopped]", dim=True, err=True)
        else:
            self._remember(question, answer)
            answer.report()

    def _context(self) -> list[Message]:
        system = [Message(role="system", content=self._system)] if self._system else []
        return [*system, *self._history]

    def _remember(self, question: Message, answer: LiveAnswer) -> None:
        self._history += [question, Message(role="assistant", content=answer.text)]


def _start_line_editing() -> None:
    """Importing readline is what gives `input` its line editing and history; some Pythons are built without it."""
    try:
        import_module("readline")
    except ImportError:
        click.echo("This Python has no readline: lines cannot be edited.", err=True)


def _explain(error: ClientError) -> str:
    if isinstance(error, ApiError) and error.code == "context_length_exceeded":
        return f"{explain(error)} (the conversation has become too long; /reset starts a new one)"
    return explain(error)
