"""HEAD and OPTIONS on every path, as RFC 9110 (sections 9.3.2 and 9.3.7) says: routes need not know of them."""

from __future__ import annotations

from contextlib import suppress

from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


class Methods:
    """Answers HEAD as GET is answered, without the content, and OPTIONS with what the path allows."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"] if scope["type"] == "http" else None
        allowed = allowed_methods(scope) if method in ("HEAD", "OPTIONS") else []
        if method == "HEAD" and "GET" in allowed:
            await self._head(scope, receive, send)
        elif method == "OPTIONS" and allowed:
            await Response(status_code=204, headers={"allow": ", ".join(allowed)})(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_head(message: Message) -> None:
            await send(message)
            await send({"type": "http.response.body", "body": b""})
            raise _AnsweredError

        inner = {**scope, "method": "GET"}
        with suppress(_AnsweredError):
            await self._app(inner, receive, send_head)
        scope["route"] = inner.get("route")


class _AnsweredError(Exception):
    """The head is sent, and the content that would follow is not wanted: it might be a stream."""


def allowed_methods(scope: Scope) -> list[str]:
    """The methods that a request's path allows; none if there is no such path."""
    routes = scope["app"].routes
    found = [
        method
        for method in _METHODS
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in routes)
    ]
    if found:
        found += ["HEAD", "OPTIONS"] if "GET" in found else ["OPTIONS"]
    return found
