"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
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


class Stream(Iterator[Chunk]):
    """The chunks of one streamed answer, as they arrive.

    The request is sent when the first chunk is asked for.  If the connection breaks in the middle, another one goes on
    where it stopped, if the server holds streams (Shoal does).  Closing the stream before its end (as leaving its
    `with` block or dropping it does) closes the connection, and the server aborts the request.
    """

    def __init__(self, chunks: Generator[Chunk, None, None], response_format: ResponseFormat | None) -> None:
        self._chunks = chunks
        self._answer = GrowingAnswer(response_format)

    def __next__(self) -> Chunk:
        chunk = next(self._chunks)
        self._answer.add(chunk)
        return chunk

    def whole(self) -> Completion[Any]:
        """Read what is still to come, and give the whole answer, as if it had not been streamed.

        Raises:
            ProtocolError: the stream was closed before its end.
        """
        for _ in self:
            pass
        return self._answer.completion()

    def close(self) -> None:
        self._chunks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ShoalClient(BaseClient[httpx.Client]):
    """Talks to a Shoal server, or any other that speaks OpenAI's protocol.  Safe to share between threads.

        with ShoalClient() as client:
            print(client.complete("def fib(n):", max_tokens=64, temperature=0).text)
            for chunk in client.stream_chat([{"role": "user", "content": "Hello!"}]):
                print(chunk.text, end="", flush=True)

    All errors that it raises are drawn in `clients/errors.py`; httpx's own never come through.

    Args:
        base_url: where the server is, with or without "/v1".
        api_key: sent as a bearer token.
        connect_timeout: seconds to wait for a connection.
        read_timeout: seconds that the server may be silent: for the first token, between two tokens, and for the
            whole answer if it is not streamed; None waits for ever.
        max_retries: how often a request is sent again that could not be delivered, or that the server refused with 429
            or 503.  If the server sends Retry-After, the client waits for so long, unless that exceeds 30 s.  A stream
            is resumed as often in a row.
    """

    _http_class = httpx.Client

    def complete(
        self, prompt: Prompt, *, response_format: ResponseFormat | None = None, **options: Unpack[CompletionOptions]
    ) -> Completion[Any]:
        """Continue a text (or several)."""
        return self._call(wire.complete(prompt, options, response_format))

    def stream_complete(
        self, prompt: Prompt, *, response_format: ResponseFormat | None = None, **options: Unpack[CompletionOptions]
    ) -> Stream:
        """Continue a text, and give what is generated as it arrives."""
        call = wire.stream_complete(prompt, options, response_format)
        return Stream(self._events(call), response_format)

    @overload
    def chat(
        self, messages: list[Message], *, response_format: type[Asked], **options: Unpack[ChatOptions]
    ) -> Completion[Asked]: ...

    @overload
    def chat(
        self,
        messages: list[Message],
        *,
        response_format: ResponseFormat | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion[Any]: ...

    def chat(
        self,
        messages: list[Message],
        *,
        response_format: ResponseFormat | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion[Any]:
        """Answer the last message of a conversation.

        Args:
            response_format: what the answer is to be: a class such as a pydantic model, of which `parsed` of the answer
                is an object then, a JSON schema, or an object as in OpenAI's API.
        """
        return self._call(wire.chat(messages, options, response_format))

    def stream_chat(
        self,
        messages: list[Message],
        *,
        response_format: ResponseFormat | None = None,
        **options: Unpack[ChatOptions],
    ) -> Stream:
        """Answer the last message of a conversation, and give the answer as it arrives."""
        call = wire.stream_chat(messages, options, response_format)
        return Stream(self._events(call), response_format)

    def embed(self, inputs: Prompt, **options: Unpack[EmbeddingOptions]) -> Embeddings:
        """Vectors of texts, or of lists of token ids."""
        return self._call(wire.embed(inputs, options))

    def models(self) -> tuple[Model, ...]:
        """The models that the server serves."""
        return self._call(wire.models())

    def tokenize(self, prompt: str | list[Message]) -> Tokenization:
        """Token ids of a text, or of a conversation under the model's chat template."""
        return self._call(wire.tokenize(prompt))

    def detokenize(self, token_ids: list[int]) -> str:
        """The text that token ids stand for."""
        return self._call(wire.detokenize(token_ids))

    def health(self) -> bool:
        """Whether the server takes requests (True), or is there but not ready (False).  Never tries twice."""
        try:
            with self._response(wire.health()) as response:
                response.read()
        except StatusError as error:
            if error.status != 503:
                raise
            return False
        return True

    def close(self) -> None:
        """Close all connections, those of unfinished streams included."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, call: wire.Call[T]) -> T:
        with self._response(call) as response:
            return call.parse(response.read())

    def _events(self, call: wire.Call[T]) -> Generator[T, None, None]:
        reader = StreamReader(call, self._max_retries)
        try:
            while not reader.is_done:
                try:
                    with self._response(reader.call) as response:
                        reader.begin(response)
                        for event in EventSource(response).iter_sse():
                            yield from reader.take(event)
                    reader.finish()
                except ClientError as error:
                    time.sleep(reader.resume(error))
        finally:
            if (path := reader.left_path) is not None:
                with suppress(httpx.HTTPError, RuntimeError):  # the latter of a client that is closed
                    self._http.delete(path, timeout=LEAVE_SECONDS)

    @contextmanager
    def _response(self, call: wire.Call[Any]) -> Iterator[httpx.Response]:
        """A successful response whose body is still to be read.  What is refused is sent again, `max_retries` times."""
        for attempt in count():
            try:
                with (
                    translated_errors(self._http.base_url),
                    self._http.stream(call.method, call.path, content=call.body, headers=call.headers) as response,
                ):
                    if not response.is_success:
                        response.read()
                        raise status_error(response)
                    yield response
                    return
            except ClientError as error:
                delay = retry_delay(error, attempt)
                if delay is None or not call.retried or attempt >= self._max_retries:
                    raise
            time.sleep(delay)
