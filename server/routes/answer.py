"""How answers travel: whole, as server-sent events, or not at all if the client has gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from shoal.scheduler.errors import ShoalError
from shoal.server.errors import StreamExpiredError, error_body, http_error

logger = logging.getLogger("shoal.api")

Value = TypeVar("Value")
_encoder = msgspec.json.Encoder(enc_hook=str)  # paths among settings
DONE = b"data: [DONE]\n\n"


def encode(body: object) -> bytes:
    return _encoder.encode(body)


def event(body: object) -> bytes:
    """One server-sent event (WHATWG HTML, section 9.2)."""
    return b"data: " + _encoder.encode(body) + b"\n\n"


def whole(body: object, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(body), media_type="application/json", headers=headers)


def error_response(error: ShoalError) -> Response:
    """The answer to a request that failed before its first byte."""
    http = http_error(error)
    headers = {"retry-after": str(http.retry_after)} if http.retry_after is not None else {}
    if http.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(encode(error_body(error)), http.status, headers, "application/json")


class EventStream(StreamingResponse):
    """A stream of server-sent events, ended by `[DONE]`.  After the headers an error is an event too.

    Each event has an id, `STREAM:NUMBER`, so that a client can say where it stopped.  When the client goes away, or the
    server does, the events are closed at once, and with them what makes them.

    Args:
        events: some at a time, without their ids.
        after: number of the event before the first.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[list[bytes], None], stream_id: str, headers: Mapping[str, str], *, after: int = 0
    ) -> None:
        self.events = _until_done(events, stream_id, after)
        super().__init__(self.events, headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events):
            await unless_disconnected(receive, self.stream_response(send))


async def _until_done(
    events: AsyncGenerator[list[bytes], None], stream_id: str, number: int
) -> AsyncGenerator[bytes, None]:
    numbered = b"id: %b:%%d\n%%b" % stream_id.encode()
    last = [DONE]
    try:
        async with aclosing(events):
            async for some in events:
                parts = []
                for one in some:
                    number += 1
                    parts.append(numbered % (number, one))
                yield b"".join(parts)
    except StreamExpiredError as error:  # the stream itself goes on, and has other events of these numbers
        yield event(error_body(error)) + DONE
        return
    except ShoalError as error:
        last = [event(error_body(error)), DONE]
    except Exception:
        logger.exception("a stream failed")
        last = [event(error_body(ShoalError("internal error"))), DONE]
    for one in last:
        number += 1
        yield numbered % (number, one)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Value]) -> Value | None:
    """Do the work, but cancel it when the client goes away; None then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for unfinished in (task, gone):
            unfinished.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
