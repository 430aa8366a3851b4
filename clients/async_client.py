"""The asynchronous client: as `clients/client.py`, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from itertools import count
from typing import Any, Self, TypeVar, Unpack, overload

import httpx
from httpx_sse import EventSource

from shoal.clients import wire
from shoal.clients.errors import ClientError, StatusError
from shoal.clients.formats import JsonModel, ResponseFormat
from shoal.clients.transport import (
    LEAVE_SECONDS,
    BaseClient,
    StreamReader,
    retry_delay,
    status_error,
    translated_errors,
)
from shoal.clients.types import (
    ChatOptions,
    Chunk,
    Completion,
    CompletionOptions,
    EmbeddingOptions,
    Embeddings,
    Message,
    Model,
    Prompt,
    Tokenization,
)
from shoal.clients.whole import GrowingAnswer

T = TypeVar("T")
Asked = TypeVar("Asked", bound=JsonModel)


class AsyncStream(AsyncIterator[Chunk]):
    """The chunks of one streamed answer, as they arrive.

    The request is sent when the first chunk is asked for.  If the connection breaks in the middle, another one goes on
    where it stopped, if the server holds streams (Shoal does).  Closing the stream before its end (as leaving its
    `async with` block does) closes the connection, and the server aborts the request.  A stream that is merely dropped
    is closed by the event loop, a little later.
    """

    def __init__(self, chunks: AsyncGenerator[Chunk, None], response_format: ResponseFormat | None) -> None:
        self._chunks = chunks
        self._answer = GrowingAnswer(response_format)

    async def __anext__(self) -> Chunk:
        chunk = await anext(self._chunks)
        self._answer.add(chunk)
        return chunk

    async def whole(self) -> Completion[Any]:
        """Read what is still to come, and give the whole answer, as if it had not been streamed."""
        async for _ in self:
            pass
        return self._answer.completion()

    async def close(self) -> None:
        await self._chunks.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncShoalClient(BaseClient[httpx.AsyncClient]):
    """`ShoalClient` for asyncio: the same arguments, methods and errors.

    async with AsyncShoalClient() as client:
        print((await client.complete("def fib(n):", max_tokens=64, temperature=0)).text)
        async with client.stream_chat([{"role": "user", "content": "Hello!"}]) as stream:
            async for chunk in stream:
                print(chunk.text, end="", flush=True)
    """

    _http_class = httpx.AsyncClient

    async def complete(
        self, prompt: Prompt, *, response_format: ResponseFormat | None = None, **options: Unpack[CompletionOptions]
    ) -> Completion[Any]:
        return await self._call(wire.complete(prompt, options, response_format))

    def stream_complete(
        self, prompt: Prompt, *, response_format: ResponseFormat | None = None, **options: Unpack[CompletionOptions]
    ) -> AsyncStream:
        call = wire.stream_complete(prompt, options, response_format)
        return AsyncStream(self._events(call), response_format)

    @overload
    async def chat(
        self, messages: list[Message], *, response_format: type[Asked], **options: Unpack[ChatOptions]
    ) -> Completion[Asked]: ...

    @overload
    async def chat(
        self,
        messages: list[Message],
        *,
        response_format: ResponseFormat | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion[Any]: ...

    async def chat(
        self,
        messages: list[Message],
        *,
        response_format: ResponseFormat | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion[Any]:
        return await self._call(wire.chat(messages, options, response_format))

    def stream_chat(
        self,
        messages: list[Message],
        *,
        response_format: ResponseFormat | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncStream:
        call = wire.stream_chat(messages, options, response_format)
        return AsyncStream(self._events(call), response_format)

    async def embed(self, inputs: Prompt, **options: Unpack[EmbeddingOptions]) -> Embeddings:
        return await self._call(wire.embed(inputs, options))

    async def models(self) -> tuple[Model, ...]:
        return await self._call(wire.models())

    async def tokenize(self, prompt: str | list[Message]) -> Tokenization:
        return await self._call(wire.tokenize(prompt))

    async def detokenize(self, token_ids: list[int]) -> str:
        return await self._call(wire.detokenize(token_ids))

    async def health(self) -> bool:
        try:
            async with self._response(wire.health()) as response:
                await response.aread()
        except StatusError as error:
            if error.status != 503:
                raise
            return False
        return True

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, call: wire.Call[T]) -> T:
        async with self._response(call) as response:
            return call.parse(await response.aread())

    async def _events(self, call: wire.Call[T]) -> AsyncGenerator[T, None]:
        reader = StreamReader(call, self._max_retries)
        try:
            while not reader.is_done:
                try:
                    async with self._response(reader.call) as response:
                        reader.begin(response)
                        async with aclosing(EventSource(response).aiter_sse()) as events:
                            async for event in events:
                                for result in reader.take(event):
                                    yield result
                    reader.finish()
                except ClientError as error:
                    await asyncio.sleep(reader.resume(error))
        finally:
            if (path := reader.left_path) is not None:
                with suppress(httpx.HTTPError, RuntimeError):
                    await self._http.delete(path, timeout=LEAVE_SECONDS)

    @asynccontextmanager
    async def _response(self, call: wire.Call[Any]) -> AsyncIterator[httpx.Response]:
        for attempt in count():
            try:
                with translated_errors(self._http.base_url):
                    request = self._http.stream(call.method, call.path, content=call.body, headers=call.headers)
                    async with request as response:
                        if not response.is_success:
                            await response.aread()
                            raise status_error(response)
                        yield response
                        return
            except ClientError as error:
                delay = retry_delay(error, attempt)
                if delay is None or not call.retried or attempt >= self._max_retries:
                    raise
            await asyncio.sleep(delay)
