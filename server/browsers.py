"""What pages in a browser may do: by default nothing, unless the page is the server's own.

A page anywhere can have its visitor's browser send requests to a server on the visitor's machine, and with a name that
resolves to 127.0.0.1 it can even read the answers.  Browsers name the page's origin, and the host that they ask for.
"""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal.server.errors import ForbiddenError
from shoal.server.routes.answer import error_response
from shoal.server.settings import ServerConfig
from shoal.server.shapes import shape_of

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


class BrowserGuard:
    """Refuses requests of foreign pages; a page of `cors_origins` is served, and told so by `CORSMiddleware`."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._origins = config.cors_origins
        # A server that others can reach is known by names that it does not know itself.
        self._hosts = (*LOCAL_NAMES, config.host, *config.allowed_hosts) if is_local(config.host) else ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(Headers(scope=scope), scope["method"])):
            await error_response(error, shape_of(scope))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, headers: Headers, method: str) -> ForbiddenError | None:
        try:
            return self._find_refusal(headers, method)
        except ValueError:  # from urlsplit
            return ForbiddenError("the header host or origin is not valid")

    def _find_refusal(self, headers: Headers, method: str) -> ForbiddenError | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._hosts and (name := urlsplit(f"//{host}").hostname) and name not in self._hosts:
            return ForbiddenError(f"this server is not {name[:100]!r}: allowed_hosts has the names that it may have")
        if origin is None or origin in self._origins or "*" in self._origins:
            return None
        if urlsplit(origin).netloc != host:
            return ForbiddenError(f"pages of {origin[:100]!r} may not use this server: cors_origins has those that may")
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return ForbiddenError("a page must send its requests as application/json")
        return None


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
