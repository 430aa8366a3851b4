"""The page's files: small, whole, and unable to do what a page should not."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.testclient import TestClient

from shoal.server.app import create_app
from shoal.server.metrics import Metrics
from shoal.server.service import Service
from shoal.server.settings import resolve

FOLDER = Path(__file__).parents[2] / "server" / "page"
FILES = sorted(path.name for path in FOLDER.iterdir() if path.name != "docs.html")
MOST_BYTES = 300 * 1024


def client(api_keys: tuple[str, ...] = (), **server: Any) -> TestClient:
    settings = resolve({"server": server})
    service = SimpleNamespace(settings=settings, api_keys=api_keys, allowances={}, metrics=Metrics("fish"))
    return TestClient(create_app(cast(Service, service)), base_url="http://localhost")


@pytest.fixture(scope="module")
def page() -> TestClient:
    return client()


@pytest.mark.parametrize("name", ["", *(f"page/{name}" for name in FILES), "page/fields.json"])
def test_a_file_is_served_from_memory_under_a_strict_policy(page: TestClient, name: str) -> None:
    answer = page.get(f"/{name}")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = page.get(f"/{name}", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = page.get(f"/{name}", headers={"if-none-match": '"another"'})
    assert other.content == answer.content
    if name.endswith((".js", ".css")):
        assert answer.content == (FOLDER / name.removeprefix("page/")).read_bytes()


@pytest.mark.parametrize("name", ["docs.html", "none.js", "%2e%2e%2fapp.py", "index.html.bak"])
def test_there_are_no_other_files(page: TestClient, name: str) -> None:
    answer = page.get(f"/page/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_the_page_is_small_and_needs_nothing_from_elsewhere(page: TestClient) -> None:
    size = sum((FOLDER / name).stat().st_size for name in FILES) + len(page.get("/page/fields.json").content)
    assert size < MOST_BYTES
    for name in FILES:
        text = (FOLDER / name).read_text("utf-8")
        found = [url for url in re.findall(r"https?://[\w./-]+", text) if not url.startswith("http://www.w3.org/")]
        assert not found, f"{name} names {found}"


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_no_text_becomes_html_or_code(name: str) -> None:
    text = (FOLDER / name).read_text("utf-8")
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc", text)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_every_import_is_of_a_file_that_is_there(name: str) -> None:
    imported = re.findall(r'^import .* from "([^"]+)";$', (FOLDER / name).read_text("utf-8"), re.MULTILINE)
    assert all(one.startswith("./") and one.removeprefix("./") in FILES for one in imported)


def test_all_modules_are_asked_for_at_once(page: TestClient) -> None:
    """Not one after the other, as they import each other."""
    asked = re.findall(r'(?:src|href)="page/([\w.]+\.js)"', page.get("/").text)
    assert sorted(asked) == [name for name in FILES if name.endswith(".js")]


def test_the_fields_have_their_ranges_and_meanings(page: TestClient) -> None:
    fields = page.get("/page/fields.json").json()
    assert fields["chat"]["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 2}
    assert fields["chat"]["temperature"]["description"]
    assert "top_k" in fields["completion"] and "n_predict" not in fields["completion"]


def test_the_page_needs_no_key_and_what_it_lives_from_does() -> None:
    guarded = client(api_keys=("secret",))
    assert guarded.get("/").status_code == 200
    assert guarded.get("/page/main.js").status_code == 200
    for path in ("/v1/engine/events", "/v1/engine/loads", "/v1/engine/requests/a"):
        assert guarded.get(path).status_code == 401
    assert guarded.post("/v1/engine/loads", json={}).status_code == 401
    assert guarded.post("/v1/engine/steps", json={}).status_code == 401
    assert guarded.post("/v1/engine/plan", json={}).status_code == 401


def test_without_the_page_there_is_nothing_of_it() -> None:
    off = client(page=False)
    for path in ("/", "/page/main.js", "/v1/engine/events", "/v1/engine/loads"):
        assert off.get(path).status_code == 404
    assert off.get("/docs").status_code == 200
    assert "/v1/engine/events" not in off.get("/openapi.json").json()["paths"]
