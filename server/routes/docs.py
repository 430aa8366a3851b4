"""GET /openapi.json and /docs: the API as a document, and as a page that needs nothing else."""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from importlib.resources import files

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.responses import HTMLResponse, Response

from shoal.server.routes.answer import encode
from shoal.server.service import Service


def docs_router(service: Service, routes: Sequence[tuple[APIRoute, bool]]) -> APIRouter:
    """The routes.

    Args:
        routes: all that are served, each with whether it asks for a key; read at the first request.
    """
    router = APIRouter()

    @cache
    def document() -> bytes:
        from shoal.server.openapi.document import make_document  # noqa: PLC0415 (most servers are never asked)

        return encode(make_document(routes, service))

    @cache
    def page() -> tuple[str, dict[str, str]]:
        text = (files("shoal.server") / "page" / "docs.html").read_text("utf-8")
        return text, {"content-security-policy": _policy(text)}

    @router.get("/openapi.json")
    async def get_document() -> Response:
        return Response(await asyncio.to_thread(document), media_type="application/json")

    @router.get("/docs", response_class=HTMLResponse)
    async def get_docs() -> Response:
        text, headers = page()
        return HTMLResponse(text, headers=headers)

    return router


def _policy(page: str) -> str:
    """A content security policy by which the page runs its own script alone, and speaks with this server alone."""

    def hashes(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{b64encode(sha256(one.encode()).digest()).decode()}'" for one in found)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
