"""The conversation of `shoal chat`."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

import click

from shoal.clients.errors import ClientError, StatusError
from shoal.clients.live import LiveAnswer, explain
from shoal.clients.types import ChatOptions, Message

if TYPE_CHECKING:
    from shoal.clients.client import ShoalClient

MAX_TOKENS = 512
MARK_TOKENS = 16  # with which a chat template marks a question and where its answer begins

HELP = """\
/help           show this
/reset          forget the conversation (the system message stays)
/system TEXT    set the system message; without TEXT, remove it
/quit           end; so does Ctrl-D
Ctrl-C stops the answer that is being given."""


def find_context(client: ShoalClient, model: str | None) -> int | None:
    """How many tokens prompt and answer may have together; None if the server does not say.

    Args:
        model: None for the server's own.
    """
    contexts = [served.max_model_len for served in client.models() if model in (None, served.id)]
    return contexts[0] if contexts else None


def longest_answer(context: int | None) -> int:
    """The longest answer that leaves room for a conversation: 512 tokens, or a quarter of a small context."""
    return min(MAX_TOKENS, context // 4) if context else MAX_TOKENS


class Repl:
    """Reads one line, answers it with the conversation as context, and repeats.

    In a terminal, an error or Ctrl-C ends the turn.  In a pipe each line is a turn too, but the first error ends all.

    Args:
        context: how many tokens a conversation and its answer may have; None if that is not known,
            until an answer is cut short by it.
        as_json: whether answers are shown as JSON.
    """

    def __init__(
        self, client: ShoalClient, options: ChatOptions, system: str | None, context: int | None, *, as_json: bool
    ) -> None:
        self._client = client
        self._options = options
        self._system = system
        self._context = context or sys.maxsize
        self._as_json = as_json
        self._history: list[Message] = []
        self._num_tokens: list[int] = []  # of each turn in the history, as far as the server counted
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        """Take turns until the input ends or /quit is read.

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
                click.secho(f"Error: {explain(error)}", fg="red", err=True)

    def _end_line(self) -> None:
        """Leave the line in which the terminal shows ^C or the prompt."""
        if self._interactive:
            click.echo(err=True)

    def _handle(self, line: str) -> None:
        """Obey a command, or answer any other line."""
        name, _, text = line.partition(" ")
        match name:
            case "":
                pass
            case "/help":
                click.echo(HELP, err=True)
            case "/reset":
                self._history, self._num_tokens = [], []
            case "/system":
                self._system = text.strip() or None
            case "/quit":
                raise click.exceptions.Exit(0)
            case _ if name.startswith("/"):
                click.echo(f"There is no command {name}; /help lists them.", err=True)
            case _:
                self._answer(line)

    def _answer(self, text: str) -> None:
        """Take one turn, without the oldest turns if the context has no room for them and a whole answer."""
        # A token has a character at least, so that a question has no more tokens than that.
        first, most = 0, len(text) + MARK_TOKENS + (self._options.get("max_tokens") or 0)
        while first < len(self._num_tokens) and sum(self._num_tokens[first:]) + most > self._context:
            first += 1
        while True:
            try:
                return self._ask(first, Message(role="user", content=text))
            except StatusError as error:
                if error.code != "context_length_exceeded" or first == len(self._num_tokens):
                    raise
            first += 1

    def _ask(self, first: int, question: Message) -> None:
        """Show the answer.  What was seen of a stopped one is remembered; a turn that fails leaves no trace.

        Args:
            first: the first turn of the history that is sent.
        """
        system = [Message(role="system", content=self._system)] if self._system else []
        answer = LiveAnswer(as_json=self._as_json)
        try:
            with self._client.stream_chat([*system, *self._history[2 * first :], question], **self._options) as stream:
                answer.show(stream, end_line=True)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            if answer.text:
                self._remember(first, question, answer)
            click.secho("[stopped]", dim=True, err=True)
        else:
            self._remember(first, question, answer)
            answer.report()

    def _remember(self, first: int, question: Message, answer: LiveAnswer) -> None:
        """Add a turn to what was sent of the conversation, and say so if that was not all of it."""
        if first:
            lost = f"{first} of {len(self._num_tokens)}"
            click.secho(f"[the context is full: the oldest turns are forgotten, {lost}]", dim=True, err=True)
        if answer.was_cut and answer.num_output_tokens < (self._options.get("max_tokens") or 0):
            self._context = answer.num_tokens
        sent = self._num_tokens[first:]
        self._num_tokens = [*sent, max(answer.num_tokens - sum(sent), 0)]
        self._history = [*self._history[2 * first :], question, Message(role="assistant", content=answer.text)]


def _start_line_editing() -> None:
    """Import readline, which gives `input` line editing and a history; some Pythons are built without it."""
    try:
        import_module("readline")
    except ImportError:
        click.echo("This Python has no readline: lines cannot be edited.", err=True)
