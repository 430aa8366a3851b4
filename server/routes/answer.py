"""How answers travel: whole, as server-sent events, or not at all if the client has gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterator, Mapping
from itertools import count
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoal.scheduler.errors import ShoalError
from shoal.server.errors import OPENAI, ErrorShape, StreamExpiredError, http_error
from shoal.server.sinks import BodyWriter, Work

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


class EventStream(Response):
    """A stream of server-sent events.  After the headers an error is an event too.

    When the client goes away, or the server does, the work is cancelled.

    Args:
        work: makes the events, without their ids.
        stream_id: of a stream that can go on.  Each event has an id then, `STREAM:NUMBER`, so that a client can say
            where it stopped.  Other streams have no ids: `vllm bench serve`, for one, cannot read them.
        after: number of the event before the first.
        shape: of errors and of the end.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        work: Work,
        headers: Mapping[str, str],
        *,
        stream_id: str = "",
        after: int = 0,
        shape: ErrorShape = OPENAI,
    ) -> None:
        self.status_code, self.background = 200, None
        self._work = work
        self._stream_id = stream_id
        self._after = after
        self._shape = shape
        # `vllm bench serve` drops the event behind a comment without an empty line; behind an id, such a line is an
        # event without data for OpenAI's client.
        self._keep_alive = shape.keep_alive or (COMMENT if stream_id else COMMENT + b"\n")
        self.init_headers({**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        ids = (b"id: %b:%d\n" % (self._stream_id.encode(), number) for number in count(self._after + 1))
        body = _Body(scope.get("state", {}).get("writer"), send, ids if self._stream_id else None)
        keeping = asyncio.create_task(body.keep_alive(self._keep_alive))
        try:
            await unless_disconnected(receive, self._fill(body))
        finally:
            keeping.cancel()

    async def _fill(self, body: _Body) -> None:
        """Have the body end with the end of the work, or with what ended it early."""
        shape, last = self._shape, b""
        try:
            await self._work(body)
        except asyncio.CancelledError:
            raise body.failure or asyncio.CancelledError() from None
        except Exception as error:
            if isinstance(error, StreamExpiredError):
                body.ids = None  # the stream itself goes on, and has other events of these numbers
            told = error if isinstance(error, ShoalError) else ShoalError("internal error")
            if told is not error:
                logger.exception("a stream failed")
            last = event(shape.body(told), shape.event)
        await body.end([one for one in (last, shape.done) if one])


class _Body:
    """Implements `Sink`: events go to the connection itself where that can be, else through the layers of ASGI.

    Args:
        writer: of the connection, if nothing has to see what is sent.
        ids: of the events that come, if they have ids.

    Attributes:
        failure: of sending; to those who make the events it is as if they were cancelled.
    """

    def __init__(self, writer: BodyWriter | None, send: Send, ids: Iterator[bytes] | None) -> None:
        self.coalesces = writer is not None  # what meets an injected fault counts the events
        self._writer = writer
        self._send = send
        self.ids = ids
        self.failure: Exception | None = None
        self._parts: list[bytes] = []  # that were put, and not yet sent
        self._clock = asyncio.get_running_loop().time
        self._put_at = self._clock()

    @property
    def is_ready(self) -> bool:
        return self._writer is not None and self._writer.is_ready

    def put(self, events: list[bytes]) -> None:
        self._put_at = self._clock()
        body = b"".join(events if self.ids is None else [next(self.ids) + one for one in events])
        if self._writer is None:
            self._parts.append(body)
        elif body:
            self._writer.write(body)

    async def flush(self) -> None:
        if self._writer is not None:
            await self._writer.drain()
        elif self._parts:
            body, self._parts = b"".join(self._parts), []
            try:
                await self._send({"type": "http.response.body", "body": body, "more_body": True})
            except Exception as error:
                self.failure = error
                raise asyncio.CancelledError from error

    async def end(self, events: list[bytes]) -> None:
        """Send the last events, and the end of the body."""
        self.put(events)
        await self._send({"type": "http.response.body", "body": b"".join(self._parts), "more_body": False})

    async def keep_alive(self, something: bytes) -> None:
        """Send something while there are no events: proxies end connections on which nothing comes."""
        while True:
            await asyncio.sleep(self._put_at + KEEP_ALIVE_SECONDS - self._clock())
            if self._clock() >= self._put_at + KEEP_ALIVE_SECONDS:
                self._put_at = self._clock()
                await self._send({"type": "http.response.body", "body": something, "more_body": True})


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
