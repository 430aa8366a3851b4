"""How answers travel: whole, as server-sent events, or not at all if the client has gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from itertools import count, repeat
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from shoal.scheduler.errors import ShoalError
from shoal.server.errors import OPENAI, ErrorShape, StreamExpiredError, http_error

logger = logging.getLogger("shoal.api")

Value = TypeVar("Value")
_encoder = msgspec.json.Encoder(enc_hook=str)  # paths among settings
KEEP_ALIVE_SECONDS = 15.0
COMMENT = b": the stream goes on\n"


def encode(body: object) -> bytes:
    return _encoder.encode(body)


def event(body: object, name: str = "") -> bytes:
    """One server-sent event (WHATWG HTML, section 9.2)."""
    named = b"event: %b\n" % name.encode() if name else b""
    return named + b"data: " + _encoder.encode(body) + b"\n\n"


def whole(body: object, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(body), media_type="application/json", headers=headers)


def error_response(error: ShoalError, shape: ErrorShape = OPENAI) -> Response:
    """The answer to a request that failed before its first byte."""
    http = http_error(error)
    headers = dict(shape.headers)
    if http.retry_after is not None:
        headers["retry-after"] = str(http.retry_after)
    if http.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(encode(shape.body(error)), http.status, headers, "application/json")


class EventStream(StreamingResponse):
    """A stream of server-sent events.  After the headers an error is an event too.

    When the client goes away, or the server does, the events are closed at once, and with them what makes them.

    Args:
        events: some at a time, without their ids.
        stream_id: of a stream that can go on.  Each event has an id then, `STREAM:NUMBER`, so that a client can say
            where it stopped.  Other streams have no ids: `vllm bench serve`, for one, cannot read them.
        after: number of the event before the first.
        shape: of errors and of the end.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[list[bytes], None],
        headers: Mapping[str, str],
        *,
        stream_id: str = "",
        after: int = 0,
        shape: ErrorShape = OPENAI,
    ) -> None:
        self.events = _until_done(events, stream_id, after, shape)
        # `vllm bench serve` drops the event behind a comment without an empty line; behind an id, such a line is an
        # event without data for OpenAI's client.
        self._keep_alive = shape.keep_alive or (COMMENT if stream_id else COMMENT + b"\n")
        super().__init__(self.events, headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = _KeepAlive(send, self._keep_alive)
        keeping = asyncio.create_task(sender.run())
        try:
            async with aclosing(self.events):
                await unless_disconnected(receive, self.stream_response(sender))
        finally:
            keeping.cancel()


class _KeepAlive:
    """Sends messages, and something else while there are none: proxies end connections on which nothing comes."""

    def __init__(self, send: Send, something: bytes) -> None:
        self._send = send
        self._something = something
        self._clock = asyncio.get_running_loop().time
        self._sent_at = self._clock()

    async def __call__(self, message: Message) -> None:
        self._sent_at = self._clock()
        await self._send(message)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._sent_at + KEEP_ALIVE_SECONDS - self._clock())
            if self._clock() >= self._sent_at + KEEP_ALIVE_SECONDS:
                await self({"type": "http.response.body", "body": self._something, "more_body": True})


async def _until_done(
    events: AsyncGenerator[list[bytes], None], stream_id: str, after: int, shape: ErrorShape
) -> AsyncGenerator[bytes, None]:
    ids = (b"id: %b:%d\n" % (stream_id.encode(), number) for number in count(after + 1)) if stream_id else repeat(b"")
    last = [shape.done] if shape.done else []
    try:
        async with aclosing(events):
            async for some in events:
                yield b"".join([next(ids) + one for one in some])
    except StreamExpiredError as error:  # the stream itself goes on, and has other events of these numbers
        yield event(shape.body(error), shape.event) + shape.done
        return
    except ShoalError as error:
        last.insert(0, event(shape.body(error), shape.event))
    except Exception:
        logger.exception("a stream failed")
        last.insert(0, event(shape.body(ShoalError("internal error")), shape.event))
    for one in last:
        yield next(ids) + one


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
