"""Streams of server-sent events: their names, their ends, and comments while nothing comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from openai._streaming import SSEDecoder
from starlette.types import Message

from shoal.scheduler.errors import EngineError, ShoalError
from shoal.server.errors import OPENAI, ErrorShape
from shoal.server.routes import answer
from shoal.server.routes.answer import EventStream, event
from shoal.server.shapes import anthropic
from shoal.server.sinks import poured

NAMED = ErrorShape(body=lambda error: {"told": error.message}, event="failed", done=b"")


async def ten(*, pause: float = 0.0, error: Exception | None = None) -> AsyncGenerator[list[bytes], None]:
    for number in range(10):
        await asyncio.sleep(pause)
        yield [event({"number": number}, "counted")]
    if error is not None:
        raise error


def sent(events: AsyncGenerator[list[bytes], None], shape: ErrorShape = OPENAI, **options: Any) -> list[str]:
    """The parts of the body, empty ones left out."""
    parts: list[Message] = []

    async def send(message: Message) -> None:
        parts.append(message)

    async def receive() -> Message:
        return await asyncio.get_running_loop().create_future()

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(EventStream(poured(events), {}, shape=shape, **options)(scope, receive, send))
    assert [part["type"] for part in parts[:2]] == ["http.response.start", "http.response.body"]
    assert [bool(part.get("more_body")) for part in parts[1:]] == [True] * (len(parts) - 2) + [False]
    return [part["body"].decode() for part in parts[1:] if part["body"]]


def test_events_have_names() -> None:
    parts = sent(ten())
    assert parts[:10] == [f'event: counted\ndata: {{"number":{n}}}\n\n' for n in range(10)]
    assert parts[10:] == ["data: [DONE]\n\n"]


def test_events_of_a_stream_that_can_go_on_have_ids() -> None:
    parts = sent(ten(), stream_id="s", after=5)
    assert parts[:10] == [f'id: s:{n + 6}\nevent: counted\ndata: {{"number":{n}}}\n\n' for n in range(10)]
    assert parts[10:] == ["id: s:16\ndata: [DONE]\n\n"]


@pytest.mark.parametrize("error", [EngineError("no more"), ValueError("a secret")], ids=str)
def test_an_error_has_the_shape_of_its_api(error: Exception) -> None:
    message = error.message if isinstance(error, ShoalError) else "internal error"
    *_, last = sent(ten(error=error), NAMED, stream_id="s")
    assert last == f'id: s:11\nevent: failed\ndata: {{"told":"{message}"}}\n\n'
    *_, last = sent(ten(error=error))
    told, done, _ = last.split("\n\n")
    assert json.loads(told.partition("data: ")[2])["error"]["message"] == message
    assert done == "data: [DONE]"


@pytest.mark.parametrize(("stream_id", "ending"), [("", "\n\n"), ("s", "\n")])
def test_a_silent_stream_is_kept_alive_by_comments(
    monkeypatch: pytest.MonkeyPatch, stream_id: str, ending: str
) -> None:
    monkeypatch.setattr(answer, "KEEP_ALIVE_SECONDS", 0.02)
    parts = sent(ten(pause=0.1), NAMED, stream_id=stream_id)
    comments = [part for part in parts if part.startswith(":")]
    assert len(comments) >= 10 and set(comments) == {f": the stream goes on{ending}"}
    assert len(parts) == len(comments) + 10
    told = SSEDecoder().iter_bytes(iter([part.encode() for part in parts]))
    assert [one.json() for one in told] == [{"number": number} for number in range(10)]


def test_an_api_may_have_an_event_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "KEEP_ALIVE_SECONDS", 0.02)
    parts = sent(ten(pause=0.1), anthropic("msg_1"))
    assert parts.count('event: ping\ndata: {"type":"ping"}\n\n') == len(parts) - 10 >= 10


def test_a_busy_stream_has_no_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "KEEP_ALIVE_SECONDS", 1000.0)
    assert len(sent(ten(), NAMED)) == 10


def test_openais_client_reads_past_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "KEEP_ALIVE_SECONDS", 0.02)
    read = SSEDecoder().iter_bytes(iter([part.encode() for part in sent(ten(pause=0.05))]))
    events = list(read)
    assert [one.json() for one in events[:-1]] == [{"number": number} for number in range(10)]
    assert events[-1].data == "[DONE]"
