from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from shoal.clients import AsyncShoalClient, Chunk, Completion, ShoalClient
from tests.clients.fake_server import FakeServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fake = FakeServer()
    yield fake
    fake.close()


class SyncDriver:
    """Calls a method of a client by name, so that one test covers both clients."""

    def __init__(self, url: str) -> None:
        self.url = url

    def call(self, method: str, *args: Any, settings: dict[str, Any] | None = None, **options: Any) -> Any:
        with ShoalClient(self.url, **settings or {}) as client:
            return getattr(client, method)(*args, **options)

    def stream(
        self,
        method: str,
        *args: Any,
        settings: dict[str, Any] | None = None,
        into: list[Chunk] | None = None,
        **options: Any,
    ) -> list[Chunk]:
        """All chunks; what came before an error is found in `into`."""
        chunks = [] if into is None else into
        with ShoalClient(self.url, **settings or {}) as client, getattr(client, method)(*args, **options) as stream:
            for chunk in stream:
                chunks.append(chunk)
        return chunks

    def whole(self, method: str, *args: Any, num_chunks: int = 0, **options: Any) -> Completion[Any]:
        """The whole of a stream, of which some chunks were read before."""
        with ShoalClient(self.url) as client, getattr(client, method)(*args, **options) as stream:
            for _ in range(num_chunks):
                next(stream)
            answer: Completion[Any] = stream.whole()
        return answer


class AsyncDriver:
    """`SyncDriver` for the asynchronous client."""

    def __init__(self, url: str) -> None:
        self.url = url

    def call(self, method: str, *args: Any, settings: dict[str, Any] | None = None, **options: Any) -> Any:
        async def run() -> Any:
            async with AsyncShoalClient(self.url, **settings or {}) as client:
                return await getattr(client, method)(*args, **options)

        return asyncio.run(run())

    def stream(
        self,
        method: str,
        *args: Any,
        settings: dict[str, Any] | None = None,
        into: list[Chunk] | None = None,
        **options: Any,
    ) -> list[Chunk]:
        chunks = [] if into is None else into

        async def run() -> None:
            async with (
                AsyncShoalClient(self.url, **settings or {}) as client,
                getattr(client, method)(*args, **options) as stream,
            ):
                async for chunk in stream:
                    chunks.append(chunk)

        asyncio.run(run())
        return chunks

    def whole(self, method: str, *args: Any, num_chunks: int = 0, **options: Any) -> Completion[Any]:
        async def run() -> Completion[Any]:
            async with AsyncShoalClient(self.url) as client, getattr(client, method)(*args, **options) as stream:
                for _ in range(num_chunks):
                    await anext(stream)
                answer: Completion[Any] = await stream.whole()
                return answer

        return asyncio.run(run())


Driver = SyncDriver | AsyncDriver


@pytest.fixture(params=[SyncDriver, AsyncDriver], ids=["sync", "async"])
def driver(request: pytest.FixtureRequest, server: FakeServer) -> Driver:
    made: Driver = request.param(server.url)
    return made
