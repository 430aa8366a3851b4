"""The page's files: small, whole, and unable to do what a page should not."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
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


# Colours that mean different things and have the same shape: in the batch, in lives of requests, in the block pool, and
# in the parts of a step.
TOGETHER = (
    ("prefill", "decode", "accepted", "empty"),
    ("rejected", "pause"),
    ("wait", "prefill", "decode", "pause", "rejected"),
    ("cached", "shared", "empty"),
    ("pause", "prefill", "decode", "shared", "accepted", "rejected", "padding"),
)
# How colours look, in linear RGB, to who lacks one kind of cone (Machado et al. 2009, severity 1).
SIGHTS = {
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
# Oklab (Ottosson 2020), in which equal distances look equal; two greys that differ by a twentieth of the way from
# black to white are 0.05 apart.
CONES = [[0.41222147, 0.53633254, 0.05144599], [0.2119035, 0.68069955, 0.10739696], [0.08830246, 0.28171884, 0.6299787]]
OKLAB = [
    [0.21045426, 0.79361779, -0.00407205],
    [1.9779985, -2.42859221, 0.45059371],
    [0.02590404, 0.78277177, -0.80867577],
]
LEAST_DISTANCE = 0.08


def seen(colour: str, sight: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    bent = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(bent <= 0.04045, bent / 12.92, ((bent + 0.055) / 1.055) ** 2.4)
    shown = np.clip(np.array(SIGHTS[sight]) @ linear, 0, 1)
    return np.asarray(np.array(OKLAB) @ np.cbrt(np.array(CONES) @ shown))


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colour_blind_people_tell_the_colours_apart(sight: str, theme: int) -> None:
    style = (FOLDER / "style.css").read_text("utf-8")
    colours = {name: both[theme] for name, *both in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", style)}
    for names in TOGETHER:
        for one, other in combinations(names, 2):
            distance = np.linalg.norm(seen(colours[one], sight) - seen(colours[other], sight))
            assert distance >= LEAST_DISTANCE, f"{one} and {other}: {distance:.3f}"
