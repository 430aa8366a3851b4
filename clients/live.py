"""An answer shown in the terminal while it arrives: its text on stdout, everything about it on stderr.

What the model thinks before it answers is about it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from time import perf_counter

import click

from shoal.clients.errors import ClientError, StatusError, UnreachableError
from shoal.clients.types import Chunk, Usage


class LiveAnswer:
    """Prints one streamed answer and measures it.  What arrived stays here if showing it is interrupted.

    Args:
        as_json: whether nothing is printed but one line of JSON, by `report`.

    Attributes:
        text: of the answer, as far as it came.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.text = ""
        self._as_json = as_json
        self._reasoning = ""
        self._model: str | None = None
        self._finish_reason: str | None = None
        self._usage: Usage | None = None
        self._seed: int | None = None
        self._started_at = perf_counter()
        self._first_text_at: float | None = None
        self._seconds = 0.0
        self._is_thinking = False

    @property
    def num_tokens(self) -> int:
        """Of prompt and answer together; 0 as long as the server has not said it."""
        return self._usage.num_prompt_tokens + self._usage.num_output_tokens if self._usage else 0

    @property
    def num_output_tokens(self) -> int:
        return self._usage.num_output_tokens if self._usage else 0

    @property
    def was_cut(self) -> bool:
        """Whether the answer had no room for more."""
        return self._finish_reason == "length"

    def show(self, chunks: Iterable[Chunk], *, end_line: bool) -> None:
        """Print the text of a stream of one choice, to its end or failure.

        Args:
            end_line: whether a line break follows the text.
        """
        try:
            for chunk in chunks:
                self._take(chunk)
        finally:
            self._seconds = perf_counter() - self._started_at
            self._end_thought()
            if self.text and end_line and not self._as_json:
                click.echo()

    def report(self) -> None:
        """Print one line on stderr, dim if that is a terminal.

        It has the tokens, their rate from request to end, the time to the first token, why it ended, and the seed.
        As JSON it goes to stdout, and has the text too.
        """
        if self._as_json:
            click.echo(json.dumps(self._report(), ensure_ascii=False))
            return
        parts = [f"{self._seconds:.2f} s"]
        if self._usage is not None:
            tokens = self._usage.num_output_tokens
            parts = [f"{tokens} tokens in {self._seconds:.2f} s", f"{tokens / self._seconds:.1f} tokens/s"]
        if self._first_text_at is not None:
            parts.append(f"first token after {self._first_text_at - self._started_at:.3f} s")
        if self._finish_reason is not None:
            parts.append(f"finish reason: {self._finish_reason}")
        if self._seed is not None:
            parts.append(f"seed {self._seed}")
        click.secho(f"[{', '.join(parts)}]", dim=True, err=True)

    def _report(self) -> dict[str, object]:
        first = self._first_text_at
        return {
            "model": self._model,
            "text": self.text,
            "reasoning": self._reasoning,
            "finish_reason": self._finish_reason,
            "seed": self._seed,
            "usage": asdict(self._usage) if self._usage else None,
            "seconds": self._seconds,
            "ttft_seconds": None if first is None else first - self._started_at,
        }

    def _take(self, chunk: Chunk) -> None:
        if self._first_text_at is None and (chunk.text or chunk.reasoning):
            self._first_text_at = perf_counter()
        self.text += chunk.text
        self._reasoning += chunk.reasoning
        self._model = chunk.model
        if not self._as_json:
            self._print(chunk)
        for delta in chunk.choices:
            self._finish_reason = delta.finish_reason or self._finish_reason
        self._usage = chunk.usage or self._usage
        self._seed = self._seed if chunk.seed is None else chunk.seed

    def _print(self, chunk: Chunk) -> None:
        if chunk.reasoning:
            self._is_thinking = True
            click.secho(chunk.reasoning, nl=False, dim=True, err=True)
        if chunk.text:
            self._end_thought()
            click.echo(chunk.text, nl=False)

    def _end_thought(self) -> None:
        if self._is_thinking:
            click.echo(err=True)
        self._is_thinking = False


def explain(error: ClientError) -> str:
    """The error as one line, and what its reader may do about it."""
    line = " ".join(error.message.split())
    if isinstance(error, UnreachableError):
        return f"{line} (is the server running? `shoal serve` starts one)"
    if isinstance(error, StatusError) and error.retry_after is not None:
        return f"{line} (try again in {error.retry_after:.0f} s)"
    return line
