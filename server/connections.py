"""What one HTTP connection may do: limits that nobody can pass, as web servers have them.

A request's head has at most 8 KiB a line, 32 KiB in all and 100 headers (nginx's limits); it and its body must come
within `client_timeout_seconds`.  Beyond a number of connections new ones are answered 503, and beyond some more not at
all, so that there are always descriptors left for what is served.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from shoal.scheduler.errors import ShoalError
from shoal.server.errors import EngineUnavailableError, HeadTooLargeError, MalformedRequestError, UrlTooLongError
from shoal.server.routes.answer import error_response
from shoal.server.shapes import shape_of
from shoal.server.sinks import BodyWriter

MAX_LINE_BYTES, MAX_HEAD_BYTES, MAX_HEADERS = 8 * 1024, 32 * 1024, 100
MAX_PIPELINED = 16  # requests of one connection behind the one that is answered
MAX_UNREAD_BYTES = 64 * 1024 * 1024  # of a body whose answer did not wait for it
RESERVED_DESCRIPTORS = 64  # for all but connections, and for those that are answered 503
LINGER_SECONDS = 1.0
PROBE_SECONDS = 0.1


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, with limits.

    Attributes:
        max_connections: beyond which requests are answered 503.
        request_seconds: in which a request must come whole.
    """

    max_connections = 960
    request_seconds = 60.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._refusal: ShoalError = MalformedRequestError("the request is not valid HTTP")
        self._num_head_bytes = 0
        self._is_half_closed = self._is_refused = False
        self._answering: RequestResponseCycle | None = None
        self._deadline = self._start_deadline()
        num_over = len(self.connections) - self.max_connections
        if num_over > RESERVED_DESCRIPTORS // 2:
            transport.abort()
        elif num_over > 0:
            self.app = _answer_full

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        self._disconnect()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether to answer although the client sends nothing more.

        It may have left, or it may wait for its answer.  What is written to one that has left comes back as an error,
        and so two interim responses (RFC 9110, section 15.2) find out.  With TLS a client that sends no more has left.
        """
        if not self.transport.can_write_eof():
            return False
        self._is_half_closed = self.cycle is not None and not self.cycle.response_complete
        if self._is_half_closed:
            self._probe()
            self.loop.call_later(PROBE_SECONDS, self._probe)
        return self._is_half_closed

    def _probe(self) -> None:
        if not (self.transport.is_closing() or self.cycle.response_started):
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    # -- the head --------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self.cycle is None or not self.cycle.more_body:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._num_head_bytes > MAX_HEAD_BYTES + len(data) and not self.transport.is_closing():
            self._refusal = _head_too_large()
            self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_head_bytes = self._num_header_bytes = self._num_unread_bytes = 0
        self._deadline.cancel()
        self._deadline = self._start_deadline()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_LINE_BYTES:
            self._refuse(UrlTooLongError(f"the URL has more than {MAX_LINE_BYTES} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(name) + len(value) > MAX_LINE_BYTES:
            self._refuse(HeadTooLargeError(f"a header has more than {MAX_LINE_BYTES} bytes"))
        self._num_header_bytes += len(name) + len(value)
        if self._num_header_bytes > MAX_HEAD_BYTES:
            self._refuse(_head_too_large())
        if len(self.headers) > MAX_HEADERS:
            self._refuse(HeadTooLargeError(f"the request has more than {MAX_HEADERS} headers"))

    def on_headers_complete(self) -> None:
        self._num_head_bytes = 0
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refuse(MalformedRequestError("too many requests at once"))
        super().on_headers_complete()
        self.cycle.transport = _Lingering(self.transport, self.cycle)  # type: ignore[assignment]

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        cycle.scope["state"] |= {"cut": self._cut, "writer": BodyWriter(cycle, self.transport)}
        super()._start_asgi_task(cycle, app)

    def _refuse(self, error: ShoalError) -> None:
        """Have the parser stop, whereupon uvicorn sends what `send_400_response` says."""
        self._refusal = error
        raise ValueError(error.message)

    def send_400_response(self, msg: str) -> None:
        """Answer with a typed error in the place of uvicorn's text.

        What the client still sends is thrown away for a moment: if it stayed unread, the answer might be lost.
        """
        self._is_refused = True
        self._deadline.cancel()
        self._deadline = self.loop.call_later(LINGER_SECONDS, self._expire)
        cycle = self.cycle
        if cycle is not None and cycle is self._answering and cycle.more_body and not cycle.response_started:
            self._disconnect()  # its body is at fault: it is answered here, and not by what waits for the body
            cycle.response_complete = True
        if cycle is None or cycle.response_complete:
            answer = error_response(self._refusal)
            headers = [b"%s: %s\r\n" % header for header in (*answer.raw_headers, (b"connection", b"close"))]
            status = STATUS_LINE[answer.status_code]
            self.transport.write(b"".join([status, *headers, b"\r\n", bytes(answer.body)]))
            if self.transport.can_write_eof():  # not with TLS, which waits for the client to close
                self.transport.write_eof()

    # -- the body, and the end -------------------------------------------------------------------------------------

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.cycle.response_complete:
            self._num_unread_bytes += len(body)
            if self._num_unread_bytes > MAX_UNREAD_BYTES:
                self._expire()

    def on_message_complete(self) -> None:
        self._deadline.cancel()
        super().on_message_complete()
        self.cycle.more_body = False
        if self.cycle.response_complete:  # the answer did not wait for the body, whose end it is
            if self.cycle.keep_alive:
                self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.transport.close)
            else:
                self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_half_closed:
            self.transport.close()

    def cut_off(self) -> None:
        """End the connection at once unless all is answered and sent."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering or self.transport.get_write_buffer_size():
            self.transport.abort()

    def _start_deadline(self) -> asyncio.TimerHandle:
        return self.loop.call_later(self.request_seconds, self._expire)

    def _cut(self) -> None:
        """Close the connection, after what is written already: an injected fault."""
        self._disconnect()
        self.transport.close()

    def _expire(self) -> None:
        """The request did not come whole in time."""
        self._disconnect()
        self.transport.abort()

    def _disconnect(self) -> None:
        """Tell the request that is answered; uvicorn tells the last one that came."""
        if self._answering is not None:
            self._answering.disconnected = True
            self._answering.message_event.set()


class _Lingering:
    """A request's transport, which does not close before the request has come whole: the answer might be lost.

    If nothing comes any more, it closes after the time for which connections are kept.
    """

    def __init__(self, transport: asyncio.Transport, cycle: RequestResponseCycle) -> None:
        self._transport = transport
        self._cycle = cycle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        if not self._cycle.more_body:
            self._transport.close()


def _head_too_large() -> HeadTooLargeError:
    return HeadTooLargeError(f"the request's head has more than {MAX_HEAD_BYTES} bytes")


async def _answer_full(scope: Scope, receive: Receive, send: Send) -> None:
    error = EngineUnavailableError("the server has as many connections as it may; try again later")
    answer: Any = error_response(error, shape_of(scope))
    answer.headers["connection"] = "close"
    await answer(scope, receive, send)
