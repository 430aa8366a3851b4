"""GET /: the page, and the files that it is made of, from memory."""

from __future__ import annotations

import asyncio
from functools import cache
from hashlib import sha256
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from shoal.server.errors import NotFoundError
from shoal.server.routes.answer import encode

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
FIELDS = "fields.json"  # is made of the types that read requests
# The page runs its own scripts alone, and speaks with this server alone.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page_router() -> APIRouter:
    router = APIRouter()

    @router.get("/", response_class=HTMLResponse)
    async def get_page(request: Request) -> Response:
        return _answer(request, *_files()["index.html"])

    @router.get("/page/{file_name}", response_class=Response)
    async def get_page_file(file_name: str, request: Request) -> Response:
        if file_name == FIELDS:
            return _answer(request, await asyncio.to_thread(_fields), "application/json")
        if file_name not in _files():
            raise NotFoundError(f"the page has no file {file_name[:64]!r}")
        return _answer(request, *_files()[file_name])

    return router


def _answer(request: Request, content: bytes, media_type: str) -> Response:
    tag = f'"{sha256(content).hexdigest()[:16]}"'
    headers = {
        "etag": tag,
        "cache-control": "no-cache",
        "content-security-policy": POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """The content and the type of each file, by its name; `docs.html` is a page of its own."""
    found = {}
    for file in (files("shoal.server") / "page").iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in TYPES and file.name != "docs.html":
            found[file.name] = file.read_bytes(), TYPES[suffix]
    return found


@cache
def _fields() -> bytes:
    from shoal.server.openapi.page_fields import describe_fields  # noqa: PLC0415 (most servers are never asked)

    return encode(describe_fields())
