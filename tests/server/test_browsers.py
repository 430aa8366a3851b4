"""Which pages, and which names of the server, are served."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from shoal.server.browsers import BrowserGuard
from shoal.server.settings import ServerConfig
from tests.server.test_embeddings import serving

JSON = {"content-type": "application/json"}


def status(method: str, headers: dict[str, str], **config: Any) -> int:
    async def answer(_: object) -> PlainTextResponse:
        await asyncio.sleep(0)
        return PlainTextResponse("served")

    app = BrowserGuard(Starlette(routes=[Route("/", answer, methods=["GET", "POST"])]), ServerConfig(**config))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        return client.request(method, "/", headers=headers).status_code


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"])
def test_local_names_are_served(host: str) -> None:
    assert status("GET", {"host": host}) == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "192.168.0.1"])
def test_other_names_of_a_local_server_are_refused(host: str) -> None:
    assert status("GET", {"host": host}) == 403
    assert status("GET", {"host": host}, host="0.0.0.0") == 200
    assert status("GET", {"host": host}, allowed_hosts=(host.partition(":")[0],)) == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "https://127.0.0.1", "null", "http://127.0.0.1:3000", "x"])
def test_foreign_pages_are_refused_unless_they_are_named(origin: str) -> None:
    assert status("POST", {"origin": origin} | JSON) == 403
    assert status("POST", {"origin": origin} | JSON, cors_origins=(origin,)) == 200
    assert status("POST", {"origin": origin} | JSON, cors_origins=("*",)) == 200


def test_the_servers_own_page_sends_json() -> None:
    own = {"origin": "http://127.0.0.1:8000"}
    assert status("GET", own) == 200
    assert status("POST", own | {"content-type": "application/json; charset=utf-8"}) == 200
    assert status("POST", own | {"content-type": "text/plain"}) == 403


@pytest.mark.parametrize("headers", [{"host": "["}, {"host": "[::1"}, {"origin": "http://["}, {"origin": "//[x]"}])
def test_headers_that_are_no_addresses_are_refused(headers: dict[str, str]) -> None:
    assert status("GET", headers) == 403


def test_what_is_no_browser_may_leave_all_that_out() -> None:
    assert status("POST", {"content-type": "application/x-www-form-urlencoded"}) == 200


def test_a_page_may_send_and_read_all_headers(tmp_path: Path) -> None:
    page, path = "http://127.0.0.1:3000", "/v1/chat/completions"
    asked = "authorization, content-type, x-stainless-lang"
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": asked}

    async def scene() -> None:
        async with serving(tmp_path, cors_origins=(page,)) as (_, client):
            allowed = await client.options(path, headers={"origin": page, **preflight})
            assert allowed.status_code == 200
            assert allowed.headers["access-control-allow-origin"] == page
            assert allowed.headers["access-control-allow-headers"] == asked
            refused = await client.post(path, json={"model": "other"}, headers={"origin": page})
            assert refused.status_code in (400, 404) and refused.headers["x-request-id"]
            assert refused.headers["access-control-expose-headers"] == "*"
            stranger = await client.options(path, headers={"origin": "http://127.0.0.1:3001", **preflight})
            assert stranger.status_code == 403 and "access-control-allow-origin" not in stranger.headers

    asyncio.run(scene())
