"""What both clients share: the way to a server, the translation of httpx's errors, and when a request is sent again."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Generic, TypeVar
from urllib.parse import quote

import httpx
from httpx_sse import ServerSentEvent, SSEError

from shoal.clients import wire
from shoal.clients.errors import (
    BrokenConnectionError,
    ClientError,
    ProtocolError,
    StatusError,
    TimedOutError,
    UnreachableError,
    UnsendableError,
)

T = TypeVar("T")
Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)

MAX_RETRY_DELAY = 30.0
"""Seconds.  If a server asks for a longer wait, the request is not sent again, and the caller decides."""

LEAVE_SECONDS = 1.0
"""Longest time for telling the server that a stream is not wanted any more."""


class BaseClient(Generic[Http]):
    """The way to one server, which either client takes.

    The number of connections is not limited: a request should wait in the server's queue, where the scheduler sees
    it, rather than in one here.

    Raises:
        UnsendableError: the address or the key is malformed.
    """

    _http_class: type[Http]

    def __init__(
        self,
        base_url: str = wire.DEFAULT_URL,
        *,
        api_key: str | None = None,
        connect_timeout: float = 5.0,
        read_timeout: float | None = 600.0,
        max_retries: int = 2,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise UnsendableError(f"base_url must start with http:// or https://, not be {base_url!r}")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise UnsendableError("api_key must be printable ASCII")
        try:
            # The path of each call has a "/v1" of its own.
            url = httpx.URL(base_url.rstrip("/").removesuffix("/v1"))
        except httpx.InvalidURL as error:
            raise UnsendableError(f"base_url {base_url!r} is not an address: {error}") from error
        self._max_retries = max_retries
        self._http: Http = self._http_class(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(read_timeout, connect=connect_timeout),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )


@contextmanager
def translated_errors(base_url: httpx.URL) -> Iterator[None]:
    """Raise what httpx raises within it as one of our errors."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise UnreachableError(f"cannot connect to {base_url}: {_reason(error)}") from error
    except httpx.TimeoutException as error:
        raise TimedOutError(f"{base_url} was silent for longer than read_timeout") from error
    except (SSEError, httpx.DecodingError) as error:
        raise ProtocolError(f"{base_url} answered something else than expected: {_reason(error)}") from error
    except httpx.HTTPError as error:
        raise BrokenConnectionError(f"the connection to {base_url} broke: {_reason(error)}") from error


def status_error(response: httpx.Response) -> StatusError:
    """The error that a response with an error status, already read, stands for."""
    wait = retry_after(response.headers.get("Retry-After"), now=time.time())
    return wire.error_of(response.status_code, response.reason_phrase, response.content, wait)


def retry_after(header: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header (RFC 9110, 10.2.3: seconds, or a date) asks for; None if it is not one.

    Args:
        now: seconds since the epoch.
    """
    if header is None:
        return None
    if header.isascii() and header.isdigit():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - now)
    except ValueError:
        return None


def retry_delay(error: ClientError, attempt: int) -> float | None:
    """Seconds to wait before the request is sent again, or None if it should not be.

    A request is sent again only if the server has not begun it: the server was not reached, or it refused (429, 503).
    Without a Retry-After, the delay doubles with each attempt (0 is the first).  It is jittered, so that clients that
    were refused together do not come back together.
    """
    refused = isinstance(error, StatusError) and error.status in (429, 503)
    if not refused and not isinstance(error, UnreachableError):
        return None
    if isinstance(error, StatusError) and error.retry_after is not None:
        return error.retry_after if error.retry_after <= MAX_RETRY_DELAY else None
    return _backoff(attempt)


class StreamReader(wire.EventReader[T]):
    """Reads one stream, over as many connections as it takes.

    The server is asked to hold the stream.  When a connection breaks, the next one goes on after the last event that
    was read.

    Args:
        max_retries: how often in a row, without an event in between, another connection is tried; with 0 the server is
            not asked.

    Attributes:
        call: to be sent next.
    """

    def __init__(self, call: wire.Call[T], max_retries: int) -> None:
        super().__init__(call)
        self.call = replace(call, more_headers={"X-Stream-Resume": "true"}) if max_retries else call
        self._max_retries = max_retries
        self._num_tries = 0
        self._last_id = call.last_event_id
        self._stream_id = self._last_id.rpartition(":")[0]
        self._break: ClientError | None = None

    def begin(self, response: httpx.Response) -> None:
        """A connection has its head; it says of a stream that is held which one it is."""
        self.headers = self.headers or response.headers
        if "x-stream-resume" in response.headers:
            self._stream_id = self._stream_id or response.headers.get("x-request-id", "")

    def take(self, event: ServerSentEvent) -> Iterator[T]:
        """The result in an event, if it has one."""
        self._num_tries = 0
        self._last_id = event.id
        self._stream_id = event.id.rpartition(":")[0]
        return self.read(event.data)

    def resume(self, error: ClientError) -> float:
        """Seconds after which to send `call`, which goes on with the stream that this error broke.

        Raises:
            ClientError: it cannot go on; what broke it.
        """
        if self.is_done:
            return 0.0
        if self._break is not None and isinstance(error, (StatusError, UnreachableError)):
            raise self._break from error
        is_break = isinstance(error, (BrokenConnectionError, TimedOutError))
        if not (is_break and self._stream_id and self._num_tries < self._max_retries):
            raise error
        self._break = error
        last = {"Last-Event-ID": self._last_id} if self._last_id else {}
        self.call = replace(self.call, method="GET", path=self._path, body=None, more_headers=last)
        self._num_tries += 1
        return _backoff(self._num_tries - 1)

    @property
    def left_path(self) -> str | None:
        """Path of a stream that is left before its end and that the server would hold for its reader; else None."""
        is_held = self._stream_id and self._max_retries and not self.call.in_background
        return self._path if is_held and not self.is_done else None

    @property
    def _path(self) -> str:
        return f"/v1/streams/{quote(self._stream_id)}"


def _backoff(attempt: int) -> float:
    return min(0.5 * 2.0 ** min(attempt, 10), MAX_RETRY_DELAY) * random.uniform(0.5, 1.0)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
