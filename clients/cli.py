"""The commands `shoal complete` and `shoal chat`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import click

from shoal import clients
from shoal.clients.errors import ClientError
from shoal.clients.live import LiveAnswer, explain
from shoal.clients.repl import Repl, find_context, longest_answer
from shoal.clients.wire import DEFAULT_URL

Function = TypeVar("Function", bound=Callable[..., Any])

CTRL_C_EXIT_CODE = 130


def _request_options(function: Function) -> Function:
    """The options of both commands: where the server is, and how to sample."""
    options = [
        click.option(
            "--url", envvar="SHOAL_URL", default=DEFAULT_URL, show_default=True,
            show_envvar=True, help="Where the server is.",
        ),
        click.option("--api-key", envvar="SHOAL_API_KEY", show_envvar=True, help="Sent as a bearer token."),
        click.option("--model", help="Name of the model; the server's own if not given."),
        click.option("--max-tokens", type=int, help="Most tokens to generate."),
        click.option("--temperature", type=float, help="0 always takes the most probable token."),
        click.option("--top-p", type=float, help="Sample from the likeliest tokens that make up this probability."),
        click.option("--top-k", type=int, help="Sample from this many of the likeliest tokens."),
        click.option("--min-p", type=float, help="Drop tokens below this share of the likeliest one's probability."),
        click.option("--repetition-penalty", type=float, help="Above 1, makes tokens that occurred before rarer."),
        click.option("--seed", type=int, help="The same seed gives the same text."),
        click.option("--stop", multiple=True, help="Stop before this text; may be given several times."),
        click.option("--json", "as_json", is_flag=True, help="A line of JSON for each answer; errors too."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


@click.command()
@click.argument("prompt")
@_request_options
def complete(prompt: str, url: str, api_key: str | None, as_json: bool, **fields: object) -> None:
    """Continue PROMPT, or standard input if PROMPT is "-".

    The text goes to standard output as it is generated, statistics go to standard error. Ctrl-C aborts the request.
    """
    with _exit_codes(), clients.ShoalClient(url, api_key=api_key, max_retries=0) as client:
        text = sys.stdin.buffer.read().decode() if prompt == "-" else prompt
        answer = LiveAnswer(as_json=as_json)
        with client.stream_complete(text, **cast(clients.CompletionOptions, _given(fields))) as stream:
            answer.show(stream, end_line=sys.stdout.isatty())
        answer.report()


@click.command()
@_request_options
@click.option("--system", help="The system message.")
def chat(url: str, api_key: str | None, system: str | None, as_json: bool, **fields: object) -> None:
    """Talk with the model; /help lists the commands.

    Ctrl-C stops an answer, Ctrl-D ends. If input or output is not a terminal, each line of standard input is a turn.

    An answer has at most 512 tokens, or a quarter of the model's context, unless --max-tokens says otherwise. When the
    context is full, the oldest turns are forgotten.
    """
    with _exit_codes(), clients.ShoalClient(url, api_key=api_key, max_retries=0) as client:
        options = cast(clients.ChatOptions, _given(fields))
        context = None
        if "max_tokens" not in options:
            context = find_context(client, options.get("model"))
            options["max_tokens"] = longest_answer(context)
        Repl(client, options, system, context, as_json=as_json).run()


def _given(fields: dict[str, object]) -> dict[str, object]:
    """The fields of the request that were given on the command line."""
    return {name: value for name, value in fields.items() if value not in (None, ())}


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Exit with 1 and one line on stderr after an error, with 130 after Ctrl-C."""
    try:
        yield
    except ClientError as error:
        raise click.ClickException(explain(error)) from error
    except UnicodeDecodeError as error:
        raise click.ClickException(f"standard input is not UTF-8: {error}") from error
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        raise click.exceptions.Exit(CTRL_C_EXIT_CODE) from None
