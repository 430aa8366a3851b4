"""What `shoal bench` does: it measures how fast a server answers, whichever has OpenAI's API.

It sends no field that others refuse, and needs nothing of the extra `loadtest`.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import click
from msgspec import Struct

from shoal.clients import AsyncShoalClient, Chunk, ClientError, Message, StatusError, Usage
from shoal.clients.async_client import AsyncStream
from shoal.loadtest.metrics import WORDS, Figures, of_requests
from shoal.loadtest.records import RequestRecord
from shoal.terminal import show

MAX_DESCRIPTORS = 65_536
PROBE_WORDS, PROBE_TOKENS, TOKENS_PER_WORD = (8, 208), 4, 1.3
BUSY = 0.8  # of a core; a client that is busier may have slowed what it measures
VOCABULARY = (  # noqa: SIM905 -- so they fill two lines, not thirty
    "river stone garden window letter morning paper village winter bridge candle forest market silver summer harbour "
    "island kitchen ladder mirror orange pencil rabbit saddle thunder velvet wagon yellow basket copper"
).split()


class Asked(Struct, kw_only=True):
    """What is sent, and how.

    Attributes:
        model: None is the first that the server names.
        rate: of an open loop, requests/s at random times; None is a closed loop of `concurrency` users.
        endpoint: chat or completions.
    """

    url: str
    api_key: str | None = None
    model: str | None = None
    num_requests: int = 64
    concurrency: int = 8
    rate: float | None = None
    prompt_tokens: int = 128
    max_tokens: int = 64
    endpoint: str = "chat"
    timeout: float = 600.0
    seed: int = 0


class Measured(Struct, kw_only=True):
    """What came of it.

    Attributes:
        errors: how many requests failed, by kind.
        examples: a message of each kind.
        counted_by: "usage" as the server counts, or "chunks" of streams where it does not say.
        client_cores: processor time of this client in each second.
    """

    model: str
    figures: Figures
    errors: dict[str, int]
    examples: dict[str, str]
    counted_by: str
    client_cores: float


async def measure(asked: Asked, advance: Callable[[], None] = lambda: None) -> Measured:
    """Send the requests and follow their streams.

    Args:
        advance: called when a request has ended.

    Raises:
        ClientError: the server answers none of the first requests, which are not measured.
    """
    _raise_limit()
    run = _Bench(asked, advance)
    client = AsyncShoalClient(asked.url, api_key=asked.api_key, read_timeout=asked.timeout, max_retries=0)
    async with client as run.client:
        await run.prepare()
        busy, began = time.process_time(), time.monotonic()
        await (run.closed_loop() if asked.rate is None else run.open_loop(asked.rate))
        seconds = time.monotonic() - began
        return run.measured(seconds, (time.process_time() - busy) / seconds)


class _Bench:
    def __init__(self, asked: Asked, advance: Callable[[], None]) -> None:
        self.client: AsyncShoalClient
        self._asked = asked
        self._advance = advance
        self._model = asked.model or ""
        self._num_words = 1
        self._began = 0.0
        self._counted_by = "usage"
        self._records: list[RequestRecord] = []
        self._errors: list[ClientError] = []

    async def prepare(self) -> None:
        """Find the model, and by two short requests how many words make a prompt of the asked length."""
        if not self._model:
            served = await self.client.models()
            if not served:
                raise ClientError("the server names no model; give one by --model")
            self._model = served[0].id
        counts = []
        for num_words in PROBE_WORDS:
            async with self._stream(self._prompt(-1, num_words), PROBE_TOKENS) as stream:
                usages = [chunk.usage async for chunk in stream if chunk.usage is not None]
            counts.append(usages[-1].num_prompt_tokens if usages else TOKENS_PER_WORD * num_words)
        tokens_per_word = max(counts[1] - counts[0], 1) / (PROBE_WORDS[1] - PROBE_WORDS[0])
        around = counts[0] - tokens_per_word * PROBE_WORDS[0]  # of the chat template
        self._num_words = max(round((self._asked.prompt_tokens - around) / tokens_per_word), 1)

    async def closed_loop(self) -> None:
        self._began = time.monotonic()
        numbers = iter(range(self._asked.num_requests))

        async def user() -> None:
            for number in numbers:
                await self._ask(number, self._now())

        async with asyncio.TaskGroup() as users:
            for _ in range(min(self._asked.concurrency, self._asked.num_requests)):
                users.create_task(user())

    async def open_loop(self, rate: float) -> None:
        self._began = time.monotonic()
        random, due = Random(self._asked.seed), 0.0
        async with asyncio.TaskGroup() as requests:
            for number in range(self._asked.num_requests):
                due += random.expovariate(rate)
                await asyncio.sleep(due - self._now())
                requests.create_task(self._ask(number, due))

    def measured(self, seconds: float, client_cores: float) -> Measured:
        answered = [record for record in self._records if record.is_answered]
        kinds = [_kind(error) for error in self._errors]
        figures: Figures = {
            **of_requests(answered, seconds),
            "errors": len(kinds),
            "seconds": seconds,
            "request rate": len(answered) / seconds,
        }
        return Measured(
            model=self._model,
            figures=figures,
            errors=dict(Counter(kinds).most_common()),
            examples={kind: " ".join(error.message.split()) for kind, error in zip(kinds, self._errors, strict=True)},
            counted_by=self._counted_by,
            client_cores=client_cores,
        )

    def _now(self) -> float:
        return time.monotonic() - self._began

    async def _ask(self, number: int, sent_at: float) -> None:
        """Follow one answer.  A chunk with text is when tokens came; of an answer without text it is the last one."""
        record = RequestRecord(request_id=str(number), sent_at=sent_at)
        self._records.append(record)
        usage: Usage | None = None
        try:
            async with self._stream(self._prompt(number, self._num_words), self._asked.max_tokens) as stream:
                async for chunk in stream:
                    usage = chunk.usage or usage
                    if chunk.text or chunk.reasoning:
                        record.token_times.append(self._now())
        except ClientError as error:
            record.error = error.message
            self._errors.append(error)
        record.finished_at = self._now()
        record.token_times = record.token_times or [record.finished_at]
        if usage is None:
            record.num_output_tokens = len(record.token_times)
            self._counted_by = "chunks" if record.error is None else self._counted_by
        else:
            record.num_prompt_tokens, record.num_output_tokens = usage.num_prompt_tokens, usage.num_output_tokens
        self._advance()

    def _stream(self, prompt: str, max_tokens: int) -> AsyncStream[Chunk, Any]:
        if self._asked.endpoint == "completions":
            return self.client.stream_complete(prompt, model=self._model, max_tokens=max_tokens)
        messages = [Message(role="user", content=prompt)]
        return self.client.stream_chat(messages, model=self._model, max_tokens=max_tokens)

    def _prompt(self, number: int, num_words: int) -> str:
        return " ".join(Random(f"{self._asked.seed} {number}").choices(VOCABULARY, k=num_words))


def _kind(error: ClientError) -> str:
    if isinstance(error, StatusError):
        return f"HTTP {error.status}{f' {error.code}' if error.code else ''}"
    return type(error).__name__.removesuffix("Error")


def _raise_limit() -> None:
    """Let this process have a connection for each request of an open loop."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# -- for people --------------------------------------------------------------------------------------------------------


def show_measured(url: str, measured: Measured) -> None:
    """Print what was measured as tables, and what must be known of it."""
    figures = measured.figures
    answered = max(figures["requests"], 1)
    rates = {
        "answered": int(figures["requests"]),
        "failed": int(figures["errors"]),
        "seconds": figures["seconds"],
        "requests/s": figures["request rate"],
        "tokens/s": figures["throughput"],
        "prompt tokens": round(figures["prompt tokens"] / answered),
        "output tokens": round(figures["output tokens"] / answered),
    }
    show(f"{measured.model} at {url}; tokens are means of a request", [rates])
    show("Latency in ms", [_latency(figures, name) for name in ("ttft", "itl", "tpot", "e2e")])
    for complaint in _complaints(measured):
        click.echo(f"! {complaint}", err=True)


def _latency(figures: Figures, name: str) -> dict[str, object]:
    """The row of one latency; what was not measured is None."""
    found = {each: figures.get(f"{name} {each}") for each in ("p50", "p90", "p99", "mean")}
    return {"": WORDS[name], **{each: None if value is None else 1000 * value for each, value in found.items()}}


def _complaints(measured: Measured) -> Sequence[str]:
    """What must be known of the figures."""
    found = [f"{count} failed, {kind}: {measured.examples[kind]}" for kind, count in measured.errors.items()]
    if measured.counted_by == "chunks":
        found.append("the server does not say how many tokens there were: output tokens are chunks of the streams")
    if measured.client_cores > BUSY and measured.figures["seconds"] > 1:
        found.append(f"this client was busy for {measured.client_cores:.0%} of the time: the server may be faster")
    return found
