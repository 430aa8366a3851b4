"""Errors of the HTTP side, the one table from errors to HTTP, and the error object of OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec
from msgspec.structs import replace

from shoal.scheduler.errors import (
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
    ShoalError,
)

MAX_MESSAGE_CHARS, MAX_PARAM_CHARS = 300, 64


class AuthenticationError(ShoalError):
    """No API key, or a wrong one."""


class ForbiddenError(ShoalError):
    """A browser's page, or the name by which the server was asked for, is not allowed."""


class NotFoundError(ShoalError):
    """No such path, or what it names."""


class ModelNotFoundError(NotFoundError):
    """No such model on this server."""


class MethodNotAllowedError(ShoalError):
    """The path exists, but not with this HTTP method."""


class BodyTooLargeError(ShoalError):
    """The request body is larger than the server reads."""


class MalformedRequestError(ShoalError):
    """What came is not HTTP."""


class UrlTooLongError(MalformedRequestError):
    """The URL is longer than the server reads."""


class HeadTooLargeError(MalformedRequestError):
    """The head of a request is larger than the server reads, or has more headers."""


class SlowClientError(ShoalError):
    """The client does not read what it asked for, and too much of it waits."""


class StreamExpiredError(ShoalError):
    """What is asked for of a stream is no longer held, or goes on in another connection."""


class IdempotencyKeyReuseError(ShoalError):
    """An idempotency key that belongs to another request."""


class RequestTimeoutError(ShoalError):
    """The request was not finished in the time that it gave itself."""


class RateLimitError(ShoalError):
    """The API key has asked for as much as it may."""


class EngineUnavailableError(ShoalError):
    """The engine is starting, or the server is shutting down."""


class BatchesUnavailableError(ShoalError):
    """Files and batches cannot be kept: another server has the folder, or the disk fails."""


class HttpError(msgspec.Struct, frozen=True):
    """How an error looks in HTTP: status, `type` and `code` of the error object, seconds to wait before a retry."""

    status: int
    type: str
    code: str | None = None
    retry_after: int | None = None


_TABLE: dict[type[ShoalError], HttpError] = {
    InvalidRequestError: HttpError(400, "invalid_request_error", "invalid_value"),
    ContextLengthError: HttpError(400, "invalid_request_error", "context_length_exceeded"),
    AuthenticationError: HttpError(401, "invalid_request_error", "invalid_api_key"),
    ForbiddenError: HttpError(403, "invalid_request_error", "forbidden"),
    NotFoundError: HttpError(404, "invalid_request_error", "not_found"),
    ModelNotFoundError: HttpError(404, "invalid_request_error", "model_not_found"),
    MethodNotAllowedError: HttpError(405, "invalid_request_error", "method_not_allowed"),
    MalformedRequestError: HttpError(400, "invalid_request_error", "malformed_request"),
    UrlTooLongError: HttpError(414, "invalid_request_error", "url_too_long"),
    HeadTooLargeError: HttpError(431, "invalid_request_error", "head_too_large"),
    SlowClientError: HttpError(408, "timeout_error", "slow_client"),
    RequestTimeoutError: HttpError(408, "timeout_error", "timeout"),
    BodyTooLargeError: HttpError(413, "invalid_request_error", "body_too_large"),
    StreamExpiredError: HttpError(410, "invalid_request_error", "stream_expired"),
    IdempotencyKeyReuseError: HttpError(422, "invalid_request_error", "idempotency_key_reuse"),
    QueueFullError: HttpError(429, "rate_limit_error", "queue_full", retry_after=1),
    RateLimitError: HttpError(429, "rate_limit_error", "rate_limit_exceeded", retry_after=1),
    EngineError: HttpError(500, "server_error", "engine_error", retry_after=1),
    EngineUnavailableError: HttpError(503, "server_error", "engine_unavailable", retry_after=1),
    BatchesUnavailableError: HttpError(503, "server_error", "batches_unavailable", retry_after=1),
    ShoalError: HttpError(500, "server_error", "internal_error"),
}

CODES = tuple(sorted({row.code for row in _TABLE.values() if row.code}))


def http_error(error: ShoalError) -> HttpError:
    """The row of the table for the error's type, or for the nearest type above it."""
    row = next(_TABLE[kind] for kind in type(error).__mro__ if kind in _TABLE)
    return row if error.retry_after is None else replace(row, retry_after=error.retry_after)


class ErrorObject(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """`{"error": {...}}`, as a response's body or as an event in a stream."""

    error: ErrorObject


def error_body(error: ShoalError) -> ErrorBody:
    http = http_error(error)
    param = error.param and error.param[:MAX_PARAM_CHARS]
    return ErrorBody(ErrorObject(_cut(error.message), http.type, param, http.code))


@dataclass(frozen=True)
class ErrorShape:
    """How an API tells of errors, and how its streams end.

    Attributes:
        body: the object of an error.
        event: name of the event that tells of one in a stream; streams of OpenAI's first API have no names.
        done: what stands at the end of each stream.
        keep_alive: an event that a stream has while nothing comes; without one it has a comment.
        headers: of every answer to the request.
    """

    body: Callable[[ShoalError], object] = error_body
    event: str = ""
    done: bytes = b"data: [DONE]\n\n"
    keep_alive: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


OPENAI = ErrorShape()


def _cut(message: str) -> str:
    """A message of bounded length: what is too long keeps its beginning and its end."""
    if len(message) <= MAX_MESSAGE_CHARS:
        return message
    return f"{message[: MAX_MESSAGE_CHARS // 2]} ... {message[5 - MAX_MESSAGE_CHARS // 2 :]}"
