"""HEAD, OPTIONS and what is counted of HTTP, with an application that is one of each kind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope

from shoal.server.methods import Methods
from shoal.server.metrics import Metrics
from shoal.server.traffic import Traffic


def make_app(metrics: Metrics, read: list[int]) -> FastAPI:
    router = APIRouter()

    @router.get("/text")
    async def text() -> Response:
        return PlainTextResponse("some text", headers={"x-seen": "yes"})

    @router.post("/text")
    async def post_text() -> Response:
        return PlainTextResponse("taken", status_code=201)

    @router.get("/things/{name:path}")
    async def thing(name: str) -> Response:
        if name == "broken":
            raise ValueError(name)
        return PlainTextResponse(f"in flight: {metrics.num_in_flight}", status_code=404 if name == "none" else 200)

    @router.delete("/things/{name:path}")
    async def delete_thing(name: str) -> Response:
        return Response(status_code=204)

    @router.get("/stream")
    async def stream() -> Response:
        async def parts() -> AsyncGenerator[bytes, None]:
            while True:
                read.append(1)
                yield b"more\n"
                await asyncio.sleep(0.001)

        return StreamingResponse(parts())

    app = FastAPI()
    app.include_router(router)
    app.add_middleware(Methods)
    app.add_middleware(Traffic, metrics=metrics)
    return app


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("fish")


@pytest.fixture
def client(metrics: Metrics) -> Iterator[TestClient]:
    with TestClient(make_app(metrics, []), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/text", "GET, POST, HEAD, OPTIONS"),
        ("/things/a/b", "GET, DELETE, HEAD, OPTIONS"),
        ("/openapi.json", "GET, HEAD, OPTIONS"),
    ],
)
def test_options_tells_what_a_path_allows(client: TestClient, path: str, methods: str) -> None:
    answer = client.options(path)
    assert (answer.status_code, answer.headers["allow"], answer.content) == (204, methods, b"")


def test_options_of_an_unknown_path_is_none(client: TestClient) -> None:
    assert client.options("/nowhere").status_code == 404
    assert client.head("/nowhere").status_code == 404


@pytest.mark.parametrize("path", ["/text", "/things/a", "/things/none", "/openapi.json"])
def test_head_is_the_head_of_get(client: TestClient, path: str) -> None:
    got, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers == got.headers


def test_head_of_what_cannot_be_got(client: TestClient) -> None:
    app = FastAPI()
    app.post("/only")(lambda: None)
    app.add_middleware(Methods)
    with TestClient(app) as other:
        assert other.head("/only").status_code == 405
        assert other.options("/only").headers["allow"] == "POST, OPTIONS"


@pytest.mark.parametrize("version", ["2.3", "2.4"])
def test_head_reads_nothing_of_a_stream(metrics: Metrics, version: str) -> None:
    """As uvicorn runs it: the scope keeps its method, and what follows the head is not asked for."""
    read: list[int] = []
    sent = asyncio.run(run(make_app(metrics, read), {"method": "HEAD", "path": "/stream"}, version))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert (sent[0]["status"], sent[1]["body"], read) == (200, b"", [])
    assert counted(metrics) == {("HEAD", "/stream", "2xx"): 1}


async def run(app: ASGIApp, scope: dict[str, Any], version: str = "2.4") -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return await asyncio.Event().wait()  # type: ignore[return-value]  # nothing comes

    async def send(message: Message) -> None:
        sent.append(message)

    whole: Scope = {"type": "http", "asgi": {"spec_version": version}, "headers": [], "query_string": b"", **scope}
    async with asyncio.timeout(5):
        await app(whole, receive, send)
    return sent


def counted(metrics: Metrics) -> dict[tuple[str, str, str], float]:
    return {
        (sample.labels["method"], sample.labels["handler"], sample.labels["status"]): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "http_requests_total" and sample.value
    }


def test_requests_are_counted_by_method_template_and_class_of_status(metrics: Metrics, client: TestClient) -> None:
    for method, path in (
        *(("GET", "/things/a"), ("GET", "/things/b/c"), ("GET", "/things/none"), ("GET", "/things/broken")),
        *(("POST", "/text"), ("HEAD", "/text"), ("GET", "/nowhere"), ("OPTIONS", "/text"), ("GET", "/health")),
    ):
        client.request(method, path)
    assert counted(metrics) == {
        ("GET", "/things/{name:path}", "2xx"): 2,
        ("GET", "/things/{name:path}", "4xx"): 1,
        ("GET", "/things/{name:path}", "5xx"): 1,
        ("POST", "/text", "2xx"): 1,
        ("HEAD", "/text", "2xx"): 1,
        ("GET", "none", "4xx"): 1,
        ("OPTIONS", "none", "2xx"): 1,
    }
    durations = metrics.registry.get_sample_value(
        "http_request_duration_seconds_count", {"method": "GET", "handler": "/things/{name:path}"}
    )
    assert durations == 4


def test_requests_in_flight(metrics: Metrics, client: TestClient) -> None:
    assert client.get("/things/a").text == "in flight: 1"
    client.get("/things/broken")
    assert metrics.num_in_flight == 0


def test_a_client_that_leaves_before_its_answer_begins(metrics: Metrics) -> None:
    async def silent(scope: Scope, receive: Receive, send: Callable[[Message], Awaitable[None]]) -> None:
        await asyncio.sleep(0)

    asyncio.run(run(Traffic(silent, metrics), {"method": "POST", "path": "/v1/completions"}))
    assert counted(metrics) == {("POST", "none", "4xx"): 1}
