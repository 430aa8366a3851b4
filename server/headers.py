"""Headers that stand in answers of all kinds, whatever they say."""

from __future__ import annotations

from collections.abc import Awaitable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.server.service import new_id

REQUEST_ID = "x-request-id"
MAX_ID_CHARS = 256  # of an id that a client gives


class AnswerHeaders:
    """Adds the request's id, the fields that were ignored, and what is left of an API key's allowance.

    Routes put what they know into the request's state: `request_id`, `ignored_fields`, `allowance`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        given = Headers(scope=scope).get(REQUEST_ID, "")

        def send_with_headers(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if 0 < len(given) <= MAX_ID_CHARS:
                    headers[REQUEST_ID] = given
                elif request_id := state.get("request_id"):
                    headers[REQUEST_ID] = request_id
                else:
                    headers.setdefault(REQUEST_ID, new_id("req"))
                if ignored := state.get("ignored_fields"):
                    headers["x-ignored-fields"] = ", ".join(ignored)
                if allowance := state.get("allowance"):
                    headers.update(allowance.headers())
            return send(message)

        await self._app(scope, receive, send_with_headers)
