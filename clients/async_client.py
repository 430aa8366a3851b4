"""The asynchronous client: as `clients/client.py`, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from itertools import count
from typing import Any, Generic, Self, TypeVar, Unpack, overload

import httpx
from httpx_sse import EventSource

from shoal.clients import wire
from shoal.clients.batches import (
    Batch,
    BatchLine,
    BatchResult,
    File,
    FileListOptions,
    ListOptions,
    OrderedListOptions,
    Page,
)
from shoal.clients.conversations import (
    Item,
    MessageAnswer,
    MessageEvent,
    MessageOptions,
    MessagePrompt,
    Response,
    ResponseEvent,
    ResponseInput,
    ResponseOptions,
)
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
    ServerInfo,
    Tokenization,
    TokenizationOptions,
    TokenizerInfo,
)
from shoal.clients.whole import Growing, GrowingAnswer, GrowingMessage, GrowingResponse

T = TypeVar("T")
Event = TypeVar("Event")
Whole = TypeVar("Whole")
Asked = TypeVar("Asked", bound=JsonModel)


class AsyncStream(AsyncIterator[Event], Generic[Event, Whole]):
    """The events of one streamed answer, as they arrive.

    The request is sent when the first chunk is asked for.  If the connection breaks in the middle, another one goes on
    where it stopped, if the server holds streams (Shoal does).  Closing the stream before its end (as leaving its
    `async with` block does) closes the connection, and the server aborts the request, unless it is a response in the
    background.  A stream that is merely dropped is closed by the event loop, a little later.
    """

    def __init__(self, events: AsyncGenerator[Event, None], answer: Growing[Event, Whole]) -> None:
        self._events = events
        self._answer = answer

    async def __anext__(self) -> Event:
        event = await anext(self._events)
        self._answer.add(event)
        return event

    async def whole(self) -> Whole:
        """Read what is still to come, and give the whole answer, as if it had not been streamed."""
        async for _ in self:
            pass
        return self._answer.whole()

    async def close(self) -> None:
        await self._events.aclose()

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
    ) -> AsyncStream[Chunk, Completion[Any]]:
        call = wire.stream_complete(prompt, options, response_format)
        return AsyncStream(self._events(call), GrowingAnswer(response_format))

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
    ) -> AsyncStream[Chunk, Completion[Any]]:
        call = wire.stream_chat(messages, options, response_format)
        return AsyncStream(self._events(call), GrowingAnswer(response_format))

    async def respond(
        self,
        input: ResponseInput,
        *,
        response_format: ResponseFormat | None = None,
        **options: Unpack[ResponseOptions],
    ) -> Response:
        return await self._call(wire.respond(input, options, response_format))

    def stream_respond(
        self,
        input: ResponseInput,
        *,
        response_format: ResponseFormat | None = None,
        **options: Unpack[ResponseOptions],
    ) -> AsyncStream[ResponseEvent, Response]:
        return AsyncStream(self._events(wire.stream_respond(input, options, response_format)), GrowingResponse())

    async def response(self, response_id: str) -> Response:
        return await self._call(wire.response(response_id))

    def stream_response(
        self, response_id: str, *, starting_after: int | None = None
    ) -> AsyncStream[ResponseEvent, Response]:
        return AsyncStream(self._events(wire.stream_response(response_id, starting_after)), GrowingResponse())

    async def cancel_response(self, response_id: str) -> Response:
        return await self._call(wire.cancel_response(response_id))

    async def delete_response(self, response_id: str) -> None:
        await self._call(wire.delete_response(response_id))

    async def input_items(self, response_id: str, **options: Unpack[OrderedListOptions]) -> Page[Item]:
        return await self._call(wire.input_items(response_id, options))

    async def count_input_tokens(self, input: ResponseInput, **options: Unpack[ResponseOptions]) -> int:
        return await self._call(wire.count_input_tokens(input, options))

    async def message(
        self,
        messages: Sequence[Message],
        *,
        response_format: ResponseFormat | None = None,
        **options: Unpack[MessageOptions],
    ) -> MessageAnswer:
        return await self._call(wire.message(messages, options, response_format))

    def stream_message(
        self,
        messages: Sequence[Message],
        *,
        response_format: ResponseFormat | None = None,
        **options: Unpack[MessageOptions],
    ) -> AsyncStream[MessageEvent, MessageAnswer]:
        call = wire.stream_message(messages, options, response_format)
        return AsyncStream(self._events(call), GrowingMessage(response_format))

    async def count_tokens(self, messages: Sequence[Message], **options: Unpack[MessagePrompt]) -> int:
        return await self._call(wire.count_tokens(messages, options))

    async def upload(self, lines: bytes | Sequence[BatchLine], *, filename: str = "lines.jsonl") -> File:
        return await self._call(wire.upload(lines, filename))

    async def files(self, **options: Unpack[FileListOptions]) -> Page[File]:
        return await self._call(wire.files(options))

    async def file(self, file_id: str) -> File:
        return await self._call(wire.file(file_id))

    async def file_content(self, file_id: str) -> bytes:
        return await self._call(wire.file_content(file_id))

    async def delete_file(self, file_id: str) -> None:
        await self._call(wire.delete_file(file_id))

    async def create_batch(
        self,
        input_file_id: str,
        endpoint: str = "/v1/chat/completions",
        *,
        completion_window: str = "24h",
        metadata: dict[str, str] | None = None,
    ) -> Batch:
        return await self._call(wire.create_batch(input_file_id, endpoint, completion_window, metadata))

    async def batches(self, **options: Unpack[ListOptions]) -> Page[Batch]:
        return await self._call(wire.batches(options))

    async def batch(self, batch_id: str) -> Batch:
        return await self._call(wire.batch(batch_id))

    async def cancel_batch(self, batch_id: str) -> Batch:
        return await self._call(wire.cancel_batch(batch_id))

    async def batch_results(self, batch: Batch) -> tuple[BatchResult, ...]:
        files = [await self._call(wire.batch_results(file_id)) for file_id in batch.result_file_ids]
        return tuple(one for results in files for one in results)

    async def embed(self, inputs: Prompt, **options: Unpack[EmbeddingOptions]) -> Embeddings:
        return await self._call(wire.embed(inputs, options))

    async def models(self) -> tuple[Model, ...]:
        return await self._call(wire.models())

    async def tokenize(self, prompt: str | list[Message], **options: Unpack[TokenizationOptions]) -> Tokenization:
        return await self._call(wire.tokenize(prompt, options))

    async def detokenize(self, token_ids: list[int]) -> str:
        return await self._call(wire.detokenize(token_ids))

    async def server_info(self) -> ServerInfo:
        return await self._call(wire.server_info())

    async def tokenizer_info(self) -> TokenizerInfo:
        return await self._call(wire.tokenizer_info())

    async def reset_prefix_cache(self) -> None:
        await self._call(wire.reset_prefix_cache())

    async def load(self) -> int:
        return await self._call(wire.load())

    async def health(self) -> bool:
        return await self._succeeds(wire.health(), 503)

    async def ready(self) -> bool:
        return await self._succeeds(wire.ready(), 429, 503)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, call: wire.Call[T]) -> T:
        async with self._response(call) as response:
            return call.parse(await response.aread(), response.headers)

    async def _succeeds(self, call: wire.Call[None], *refusals: int) -> bool:
        try:
            await self._call(call)
        except StatusError as error:
            if error.status not in refusals:
                raise
            return False
        return True

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
