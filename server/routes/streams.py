"""Answers that are read again: after a connection that broke, or because the same request came twice."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import wraps
from hashlib import sha256
from importlib.metadata import version

from fastapi import Request
from starlette.responses import Response

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.errors import ErrorShape, StreamExpiredError
from shoal.server.keys import known_key, owner_name
from shoal.server.peers import Origin
from shoal.server.routes.answer import EventStream, unless_disconnected
from shoal.server.routes.extras import TIMING_HEADER
from shoal.server.routes.pieces import in_pieces
from shoal.server.service import Service
from shoal.server.sinks import Sink, Work, poured
from shoal.server.streams import Answer, Key
from shoal.server.terms import TIMEOUT_HEADER

MAX_KEY_CHARS = 255

Handler = Callable[[Request], Awaitable[Response]]


def answered_once(service: Service) -> Callable[[Handler], Handler]:
    """Have a route do once what is asked for under one `Idempotency-Key`, and answer all who ask alike."""

    def decorate(handler: Handler) -> Handler:
        @wraps(handler)
        async def answer_once(request: Request) -> Response:
            key = idempotency_key(service, request)
            if key is None:
                return await handler(request)
            digest = sha256(request.url.path.encode() + b"\n" + await request.body()).digest()
            answer = await service.streams.claim(key, digest)
            if answer is not None:
                return await deliver(service, request, answer, after=last_event(request, answer))
            try:
                if "last-event-id" in request.headers:
                    raise StreamExpiredError("no stream is held under this Idempotency-Key, so that it cannot go on")
                return await handler(request)
            finally:
                service.streams.release(key)

        return answer_once

    return decorate


def is_held(service: Service, request: Request, *, is_stream: bool) -> bool:
    """Whether the request asks for an answer that outlives its connection."""
    asked = is_stream and request.headers.get("x-stream-resume", "").lower() == "true"
    return (asked or "idempotency-key" in request.headers) and service.streams.grace_seconds > 0


def idempotency_key(service: Service, request: Request) -> Key | None:
    """The key that the request carries, if it carries one and answers are held.

    Raises:
        InvalidRequestError: it is empty or too long.
    """
    key = request.headers.get("idempotency-key")
    if key is None or not service.streams.grace_seconds:
        return None
    if not 0 < len(key) <= MAX_KEY_CHARS:
        raise InvalidRequestError(
            f"Idempotency-Key: expected 1 to {MAX_KEY_CHARS} characters, not {len(key)}", param="Idempotency-Key"
        )
    return known_key(request, service.api_keys), key


async def hold(
    service: Service,
    request: Request,
    answer_id: str,
    headers: Mapping[str, str],
    work: Work,
    *,
    is_stream: bool,
    shape: ErrorShape,
) -> Response:
    """Have the answer made and held, and send it."""
    owner, key = known_key(request, service.api_keys), idempotency_key(service, request)
    answer = Answer(answer_id, owner, {**headers, "x-stream-resume": "true"}, is_stream, key, shape)
    service.streams.begin(answer, work)
    if is_stream and service.peers is not None:
        await service.peers.note(await _origin(service, request))
    return await deliver(service, request, answer)


async def _origin(service: Service, request: Request) -> Origin:
    return Origin(
        request.state.identity,
        maker(service),
        owner_name(known_key(request, service.api_keys)),
        request.scope["path"],
        {name: request.headers[name] for name in (TIMEOUT_HEADER, TIMING_HEADER) if name in request.headers},
        await request.body(),
        service.streams.grace_seconds,
    )


def maker(service: Service) -> str:
    """Who makes the same tokens and events."""
    return f"{version('shoal')} {service.fingerprint}"


def only_event(pieces: Awaitable[Sequence[bytes | bytearray]]) -> Work:
    """The work whose only event is all these pieces."""

    async def work(sink: Sink) -> None:
        sink.put([b"".join(await pieces)])

    return work


async def deliver(
    service: Service, request: Request, answer: Answer, *, after: int = 0, takes_over: bool = False
) -> Response:
    """Send an answer, of a stream what follows after so many events.

    Raises:
        StreamExpiredError, InvalidRequestError: the stream cannot be read from there.
        ShoalError: what ended an answer that is not a stream.
    """
    if not answer.is_stream:
        body = await unless_disconnected(request.receive, _whole(service, answer))
        return in_pieces([body] if body else [], answer.headers)
    answer.check(after)
    if after > answer.num_events:  # its end was read too, and a browser's EventSource comes back until it is told so
        return Response(status_code=204, headers=answer.headers)
    work = poured(service.streams.read(answer, after, takes_over=takes_over))
    return EventStream(work, answer.headers, stream_id=answer.id, after=after, shape=answer.shape)


async def _whole(service: Service, answer: Answer) -> bytes:
    return b"".join([event async for events in service.streams.read(answer) for event in events])


def last_event(request: Request, answer: Answer) -> int:
    """The number of the event after which the client goes on; 0 is the beginning.

    Raises:
        InvalidRequestError: its `Last-Event-ID` is none of this stream.
    """
    last = request.headers.get("last-event-id")
    if last is None:
        return 0
    stream_id, _, number = last.rpartition(":")
    if stream_id != answer.id or not (number.isascii() and number.isdigit() and len(number) < 10):
        raise InvalidRequestError(f"Last-Event-ID: expected {answer.id}:NUMBER", param="Last-Event-ID")
    return int(number)
