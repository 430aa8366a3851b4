"""Injects faults into answers, where the settings ask for it: see `server/faults.py`.

It works on the messages of ASGI, so that every endpoint has it.  An injected error is answered as a real one is, and
only the header `x-shoal-fault` tells them apart.
"""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import suppress

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.scheduler.errors import EngineError, InvalidRequestError, QueueFullError, ShoalError
from shoal.server.errors import EngineUnavailableError
from shoal.server.faults import Fault, FaultsConfig, Numbers, Script
from shoal.server.keys import known_key
from shoal.server.routes.answer import error_response, event
from shoal.server.shapes import shape_of

logger = logging.getLogger("shoal.faults")

HEADER, SCOPE_HEADER = "x-shoal-fault", "x-shoal-fault-scope"

REFUSALS: dict[str, ShoalError] = {
    "429": QueueFullError("the server is full; try again later"),
    "500": ShoalError("internal error"),
    "503": EngineUnavailableError("the server is starting; try again later"),
}
ERRORS: dict[str, ShoalError] = {
    "error": ShoalError("internal error"),
    "engine_error": EngineError("the engine died each of 4 times that it worked on this request"),
}


class FaultInjector:
    """Has requests that generate meet the faults of a script: their own, or that of the settings."""

    def __init__(self, app: ASGIApp, config: FaultsConfig, api_keys: tuple[str, ...]) -> None:
        self._app = app
        self._config = config
        self._api_keys = api_keys
        self._numbers = Numbers()
        logger.warning("faults are injected: script %s, header %s", config.fault_script, config.fault_header)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            fault = self._fault(request)
        except ValueError as error:
            fault_of_header = InvalidRequestError(f"{HEADER}: {error}", param=HEADER)
            refused = error_response(fault_of_header, shape_of(scope))
            await refused(scope, receive, send)
            return
        if fault is None:
            await self._app(scope, receive, send)
            return
        logger.info("%s meets %s", scope["path"], fault)
        if fault.name in REFUSALS:
            await _error_answer(REFUSALS[fault.name], fault, scope)(scope, receive, send)
        elif fault.after is None:
            request.state.cut()
        else:
            if fault.name == "kill":
                request.state.die_after = fault.after
            request.state.writer = None  # all that is sent has to come by here
            with suppress(_EndedEarlyError):
                await self._app(scope, receive, _Answer(fault, request, send).send)

    def _fault(self, request: Request) -> Fault | None:
        """What the request meets.

        Raises:
            ValueError: its header is no script.
        """
        own = request.headers.get(HEADER) if self._config.fault_header else None
        text = own if own is not None else self._config.fault_script
        if text is None or (self._api_keys and known_key(request, self._api_keys) is None):
            return None
        script = Script(text)
        # A hash is small, whatever the client sends.
        told = (request.headers.get(name) for name in ("authorization", "x-api-key", SCOPE_HEADER))
        series = hash((text, *told))
        return script.fault(self._numbers.next(series), self._config.fault_seed)


class _EndedEarlyError(Exception):
    """The fault has ended the answer, and what the application still sends is not wanted."""


class _Answer:
    """What an application sends, with a fault among the events of a stream, or in the middle of a whole answer."""

    def __init__(self, fault: Fault, request: Request, send: Send) -> None:
        self._fault = fault
        self._request = request
        self._send = send
        self._is_stream = False
        self._num_left = -1  # pieces to send until the fault; below 0 there is none

    async def send(self, message: Message) -> None:
        match message["type"]:
            case "http.response.start":
                await self._begin(message)
            case "http.response.body":
                for piece in self._pieces(message.get("body", b"")):
                    body = await self._meet(piece) if self._num_left == 0 else piece
                    self._num_left -= 1
                    await self._send({"type": "http.response.body", "body": body, "more_body": True})
                if not message.get("more_body", False):
                    await self._send({"type": "http.response.body", "body": b""})
            case _:
                await self._send(message)

    async def _begin(self, message: Message) -> None:
        """Send the head.  What is an error by itself stays as it is."""
        if message["status"] == 200:
            headers = MutableHeaders(scope=message)
            headers[HEADER] = self._fault.name
            self._is_stream = headers.get("content-type", "").startswith("text/event-stream")
            if self._fault.name in ERRORS and not self._is_stream:
                answer = _error_answer(ERRORS[self._fault.name], self._fault, self._request.scope)
                await answer(self._request.scope, self._request.receive, self._send)
                raise _EndedEarlyError
            after = self._fault.after or 0
            self._num_left = after if self._is_stream else min(after, 1)
        await self._send(message)

    def _pieces(self, body: bytes) -> list[bytes]:
        """The events in a part of a stream, or the halves of a whole answer."""
        if self._is_stream:
            return [piece for piece in re.split(rb"(?<=\n\n)", body) if piece]
        return [body[: len(body) // 2], body[len(body) // 2 :]]

    async def _meet(self, piece: bytes) -> bytes:
        """Have the fault happen before this piece, which may become another."""
        match self._fault.name:
            case "slow" | "stall":
                await asyncio.sleep(self._fault.seconds)
            case "malformed":
                return piece.replace(b'"', b"'")
            case "cut":
                self._request.state.cut()
                raise _EndedEarlyError
            case "error" | "engine_error" as name:
                shape = shape_of(self._request.scope)
                told = event(shape.body(ERRORS[name]), shape.event) + shape.done
                await self._send({"type": "http.response.body", "body": told})
                raise _EndedEarlyError
        return piece


def _error_answer(error: ShoalError, fault: Fault, scope: Scope) -> Response:
    answer = error_response(error, shape_of(scope))
    answer.headers[HEADER] = fault.name
    if fault.retry_after is not None:
        answer.headers["retry-after"] = str(fault.retry_after)
    return answer
