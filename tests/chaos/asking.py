"""What the chaos asks of a server, and how answers of every shape are compared."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any, NamedTuple

import httpx

NUM_QUESTIONS = 48
SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99999}, "minItems": 20, "maxItems": 40}
Body = dict[str, Any]


class Answer(NamedTuple):
    """An answer without what differs from call to call (its id and its date).

    Attributes:
        choices: by index: text, reason of the end, log-probabilities.
        usage: prompt and completion tokens.
    """

    choices: dict[int, tuple[str, str | None, str]]
    usage: tuple[int, int] | None


class RefusedError(Exception):
    """The server answered with a typed error."""

    def __init__(self, status: int, error: dict[str, Any]) -> None:
        super().__init__(f"{status}: {error}")
        self.status, self.code = status, error["code"]


def question(number: int) -> tuple[str, Body]:
    """Path and body of a request; the fields take turns."""
    body: Body = {"max_tokens": 24 + number % 5 * 24, "seed": number, "temperature": 0.8 if number % 2 else 0}
    if number % 4 == 3:
        content = f"What is {number} times {number + 1}?"
        body |= {"messages": [{"role": "user", "content": content}]}
        return "/v1/chat/completions", body | ({"logprobs": True, "top_logprobs": 2} if number % 8 == 3 else {})
    stem = "import os\nimport sys\n\n" * (12 if number % 6 == 0 else 1)  # long ones share it
    body |= {"prompt": f"{stem}def f{number}(x):\n    "}
    for divisor, fields in (
        (2, {"ignore_eos": True}),
        (3, {"logprobs": 3}),
        (4, {"n": 2}),
        (5, {"echo": True, "logprobs": 2}),
        (7, {"stop": ["return"]}),
        (9, {"frequency_penalty": 0.5, "min_p": 0.02}),
        (11, {"speculation": "off"}),
        (13, {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}, "max_tokens": 300}),
    ):
        if number % divisor == 0:
            body |= fields
    return "/v1/completions", body


def read_whole(answer: Body) -> Answer:
    return _joined([answer])


class Cursor:
    """The id of the event that was read last."""

    last = ""


async def events(response: httpx.Response, cursor: Cursor) -> AsyncIterator[Body]:
    """The events of a stream.

    Args:
        cursor: is moved with every event.

    Raises:
        RefusedError: an event is an error.
        EOFError: the stream ended without `[DONE]`.
    """
    event_id = ""
    async for line in response.aiter_lines():
        event_id = line.removeprefix("id: ") if line.startswith("id: ") else event_id
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            event = json.loads(line[6:])
            cursor.last = event_id
            if "error" in event:
                raise RefusedError(response.status_code, event["error"])
            yield event
    raise EOFError("the stream ended without [DONE]")


def read_stream(found: Iterable[Body]) -> Answer:
    return _joined(found)


def _joined(parts: Iterable[Body]) -> Answer:
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    scored: dict[int, list[Any]] = {}
    usage = None
    for part in parts:
        for choice in part["choices"]:
            index = choice["index"]
            said = choice.get("message") or choice.get("delta") or {}
            texts[index] = texts.get(index, "") + (choice.get("text") or said.get("content") or "")
            reasons[index] = choice["finish_reason"] or reasons.get(index)
            if logprobs := choice.get("logprobs"):
                lists = (
                    [logprobs["content"]] if "content" in logprobs else [logprobs[name] for name in sorted(logprobs)]
                )
                scored.setdefault(index, []).extend(zip(*lists, strict=True))
        if part.get("usage"):
            usage = part["usage"]["prompt_tokens"], part["usage"]["completion_tokens"]
    choices = {i: (texts[i], reasons[i], json.dumps(scored.get(i))) for i in sorted(texts)}
    return Answer(choices, usage)


async def ask(http: httpx.AsyncClient, number: int) -> Answer:
    """The answer, whole.

    Raises:
        RefusedError: the server answered with an error.
    """
    path, body = question(number)
    response = await http.post(path, json=body)
    check(response)
    return read_whole(response.json())


def check(response: httpx.Response) -> None:
    """Raise RefusedError unless a response, which was read, is a success."""
    if not response.is_success:
        raise RefusedError(response.status_code, response.json()["error"])


def streamed(body: Body) -> Body:
    return body | {"stream": True, "stream_options": {"include_usage": True}}


class Gaps:
    """The longest silence of a stream, in seconds."""

    def __init__(self) -> None:
        self.longest, self._last = 0.0, time.monotonic()

    def note(self) -> None:
        now = time.monotonic()
        self.longest, self._last = max(self.longest, now - self._last), now
