"""The HTTP application: routes, who may call them, and what becomes of errors."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.params import Depends as Dependency
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.scheduler.errors import ShoalError
from shoal.server.browsers import BrowserGuard
from shoal.server.errors import (
    AuthenticationError,
    BodyTooLargeError,
    MethodNotAllowedError,
    NotFoundError,
)
from shoal.server.headers import AnswerHeaders
from shoal.server.injection import FaultInjector
from shoal.server.keys import known_key
from shoal.server.logs import PROBES
from shoal.server.methods import Methods, allowed_methods
from shoal.server.routes.answer import error_response
from shoal.server.routes.batches import batches_router
from shoal.server.routes.chat import chat_router
from shoal.server.routes.completions import completions_router
from shoal.server.routes.docs import docs_router
from shoal.server.routes.embeddings import embeddings_router
from shoal.server.routes.engine import engine_router
from shoal.server.routes.messages import messages_router
from shoal.server.routes.models import models_router
from shoal.server.routes.operations import operations_router
from shoal.server.routes.page import page_router
from shoal.server.routes.plan import plan_router
from shoal.server.routes.responses import kept_responses_router, responses_router
from shoal.server.routes.resuming import streams_router
from shoal.server.routes.tokenize import tokenize_router
from shoal.server.service import Service
from shoal.server.shapes import shape_of
from shoal.server.traffic import Traffic
from shoal.server.wire.batches import MAX_FILE_BYTES

logger = logging.getLogger("shoal.api")


def create_app(service: Service) -> FastAPI:
    """Put the application together."""
    app = FastAPI(openapi_url=None)
    guarded = [Depends(_key_check(service.api_keys))]
    limited = [*guarded, Depends(_allowance_of_key(service))] if service.allowances else guarded

    served: list[tuple[APIRoute, bool]] = []

    def include(router: APIRouter, dependencies: Sequence[Dependency] = ()) -> None:
        app.include_router(router, dependencies=dependencies)
        served.extend((route, bool(dependencies)) for route in router.routes if isinstance(route, APIRoute))
        for route in router.routes:
            if isinstance(route, APIRoute) and route.path not in PROBES:
                for method in route.methods or ():
                    service.metrics.serves(method, route.path)

    for router in (completions_router, chat_router, messages_router, responses_router, embeddings_router):
        include(router(service), limited)
    for router in (streams_router, kept_responses_router, models_router, tokenize_router, batches_router):
        include(router(service), guarded)
    if service.settings.server.page:
        include(engine_router(service), guarded)
        include(plan_router(service), guarded)
        include(page_router())
    include(operations_router(service))
    include(docs_router(service, served))
    config, faults = service.settings.server, service.settings.faults
    if faults.is_on:
        app.add_middleware(FaultInjector, config=faults, api_keys=service.api_keys)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    app.add_middleware(Methods)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(BrowserGuard, config=config)
    app.add_middleware(Traffic, metrics=service.metrics)
    app.add_middleware(AnswerHeaders)
    app.add_exception_handler(ShoalError, _error_answers(service))
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(ClientDisconnect, _answer_vanished_client)
    app.add_exception_handler(Exception, _answer_unexpected)
    return app


class BodyLimit:
    """Refuses to read request bodies beyond a limit, whether they announce their length or not.

    Args:
        max_bytes: of a body; files may be larger.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        max_bytes = MAX_FILE_BYTES if scope["path"] == "/v1/files" else self.max_bytes
        announced = int(dict(scope["headers"]).get(b"content-length", b"0"))
        read = 0

        async def receive_limited() -> Message:
            nonlocal read
            if announced > max_bytes:
                raise self._error(announced, max_bytes)
            message = await receive()
            read += len(message.get("body", b""))
            if read > max_bytes:
                raise self._error(read, max_bytes)
            return message

        await self.app(scope, receive_limited, send)

    @staticmethod
    def _error(size: int, max_bytes: int) -> BodyTooLargeError:
        return BodyTooLargeError(f"the request body has {size} bytes or more, but at most {max_bytes} are read")


def _key_check(api_keys: tuple[str, ...]):  # type: ignore[no-untyped-def]  # FastAPI reads the inner signature
    async def check(request: Request) -> None:
        if api_keys and known_key(request, api_keys) is None:
            raise AuthenticationError(
                "missing or unknown API key: send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'"
            )

    return check


def _allowance_of_key(service: Service):  # type: ignore[no-untyped-def]  # likewise
    async def note(request: Request) -> None:
        request.state.allowance = service.allowances[known_key(request, service.api_keys)]  # for AnswerHeaders

    return note


def _error_answers(service: Service) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, ShoalError)
        if request.method == "POST":
            service.metrics.refused(error)
        return error_response(error, shape_of(request.scope))

    return answer


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """What the framework itself refuses."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.scope['path']}"  # request.url takes the header host for valid
    told: ShoalError = ShoalError(str(error.detail))
    if error.status_code == 404:
        told = NotFoundError(f"unknown path: {where}")
    if error.status_code == 405:
        told = MethodNotAllowedError(f"method not allowed: {where}")
    answer = error_response(told, shape_of(request.scope))
    if error.status_code == 405:
        answer.headers["allow"] = ", ".join(allowed_methods(request.scope))
    return answer


async def _answer_vanished_client(_: Request, __: Exception) -> Response:
    """The client went away before it had sent its whole request."""
    return Response(status_code=400)


async def _answer_unexpected(request: Request, error: Exception) -> Response:
    logger.error("%s %r failed", request.method, request.scope["path"], exc_info=error)
    return error_response(ShoalError("internal error"), shape_of(request.scope))
