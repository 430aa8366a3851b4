"""Counts and times HTTP requests."""

from __future__ import annotations

import time
from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.server.logs import PROBES
from shoal.server.metrics import Metrics

_GONE = 499  # nginx's status of a client that left before its answer began


class Traffic:
    """Tells the metrics of each request but those that ask how the server is."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), _GONE

        def send_noting(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            return send(message)

        self._metrics.num_in_flight += 1
        try:
            await self._app(scope, receive, send_noting)
        except Exception:
            status = 500
            raise
        finally:
            self._metrics.num_in_flight -= 1
            handler = getattr(scope.get("route"), "path", "none")
            self._metrics.responded(scope["method"], handler, status, time.monotonic() - began)
