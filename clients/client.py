"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
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


class Stream(Iterator[Event], Generic[Event, Whole]):
    """The events of one streamed answer, as they arrive.

    The request is sent when the first chunk is asked for.  If the connection breaks in the middle, another one goes on
    where it stopped, if the server holds streams (Shoal does).  Closing the stream before its end (as leaving its
    `with` block or dropping it does) closes the connection, and the server aborts the request, unless it is a response
    in the background.
    """

    def __init__(self, events: Generator[Event, None, None], answer: Growing[Event, Whole]) -> None:
        self._events = events
        self._answer = answer

    def __next__(self) -> Event:
        event = next(self._events)
        self._answer.add(event)
        return event

    def whole(self) -> Whole:
        """Read what is still to come, and give the whole answer, as if it had not been streamed.

        Raises:
            ProtocolError: the stream was closed before its end.
        """
        for _ in self:
            pass
        return self._answer.whole()

    def close(self) -> None:
        self._events.close()

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
    ) -> Stream[Chunk, Completion[Any]]:
        """Continue a text, and give what is generated as it arrives."""
        call = wire.stream_complete(prompt, options, response_format)
        return Stream(self._events(call), GrowingAnswer(response_format))

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
    ) -> Stream[Chunk, Completion[Any]]:
        """Answer the last message of a conversation, and give the answer as it arrives."""
        call = wire.stream_chat(messages, options, response_format)
        return Stream(self._events(call), GrowingAnswer(response_format))

    def respond(
        self,
        input: ResponseInput,
        *,
        response_format: ResponseFormat | None = None,
        **options: Unpack[ResponseOptions],
    ) -> Response:
        """Answer in items, as OpenAI's Responses API does."""
        return self._call(wire.respond(input, options, response_format))

    def stream_respond(
        self,
        input: ResponseInput,
        *,
        response_format: ResponseFormat | None = None,
        **options: Unpack[ResponseOptions],
    ) -> Stream[ResponseEvent, Response]:
        """Answer in items, and give the events as they arrive."""
        return Stream(self._events(wire.stream_respond(input, options, response_format)), GrowingResponse())

    def response(self, response_id: str) -> Response:
        """A response that the server keeps."""
        return self._call(wire.response(response_id))

    def stream_response(
        self, response_id: str, *, starting_after: int | None = None
    ) -> Stream[ResponseEvent, Response]:
        """The events of a response in the background, as they come.

        Args:
            starting_after: `sequence_number` of the event behind which they begin.
        """
        return Stream(self._events(wire.stream_response(response_id, starting_after)), GrowingResponse())

    def cancel_response(self, response_id: str) -> Response:
        """End a response in the background; what it has said is kept."""
        return self._call(wire.cancel_response(response_id))

    def delete_response(self, response_id: str) -> None:
        """Have the server forget a response."""
        self._call(wire.delete_response(response_id))

    def input_items(self, response_id: str, **options: Unpack[OrderedListOptions]) -> Page[Item]:
        """The conversation that a response answers."""
        return self._call(wire.input_items(response_id, options))

    def count_input_tokens(self, input: ResponseInput, **options: Unpack[ResponseOptions]) -> int:
        """How many tokens the prompt of a response would have."""
        return self._call(wire.count_input_tokens(input, options))

    def message(
        self,
        messages: Sequence[Message],
        *,
        response_format: ResponseFormat | None = None,
        **options: Unpack[MessageOptions],
    ) -> MessageAnswer:
        """Answer in blocks, as Anthropic's Messages API does, which wants `model` and `max_tokens` in each request."""
        return self._call(wire.message(messages, options, response_format))

    def stream_message(
        self,
        messages: Sequence[Message],
        *,
        response_format: ResponseFormat | None = None,
        **options: Unpack[MessageOptions],
    ) -> Stream[MessageEvent, MessageAnswer]:
        """Answer in blocks, and give the events as they arrive."""
        call = wire.stream_message(messages, options, response_format)
        return Stream(self._events(call), GrowingMessage(response_format))

    def count_tokens(self, messages: Sequence[Message], **options: Unpack[MessagePrompt]) -> int:
        """How many tokens the prompt of a message would have."""
        return self._call(wire.count_tokens(messages, options))

    def upload(self, lines: bytes | Sequence[BatchLine], *, filename: str = "lines.jsonl") -> File:
        """Have the server keep the lines of a batch: requests, or a file of them."""
        return self._call(wire.upload(lines, filename))

    def files(self, **options: Unpack[FileListOptions]) -> Page[File]:
        """The files that the server keeps, those of answers too."""
        return self._call(wire.files(options))

    def file(self, file_id: str) -> File:
        """One of them."""
        return self._call(wire.file(file_id))

    def file_content(self, file_id: str) -> bytes:
        """What is in it."""
        return self._call(wire.file_content(file_id))

    def delete_file(self, file_id: str) -> None:
        """Have the server forget a file."""
        self._call(wire.delete_file(file_id))

    def create_batch(
        self,
        input_file_id: str,
        endpoint: str = "/v1/chat/completions",
        *,
        completion_window: str = "24h",
        metadata: dict[str, str] | None = None,
    ) -> Batch:
        """Have the server run the lines of a file when it has room; all of them go to the endpoint.

        Args:
            completion_window: when it gives up, as a number and "s", "m", "h" or "d".
        """
        return self._call(wire.create_batch(input_file_id, endpoint, completion_window, metadata))

    def batches(self, **options: Unpack[ListOptions]) -> Page[Batch]:
        """The batches that the server keeps."""
        return self._call(wire.batches(options))

    def batch(self, batch_id: str) -> Batch:
        """One of them, as far as it has come."""
        return self._call(wire.batch(batch_id))

    def cancel_batch(self, batch_id: str) -> Batch:
        """End a batch; the answers that are there are kept."""
        return self._call(wire.cancel_batch(batch_id))

    def batch_results(self, batch: Batch) -> tuple[BatchResult, ...]:
        """What became of each line of a batch that has ended: answers first, then errors."""
        files = [self._call(wire.batch_results(file_id)) for file_id in batch.result_file_ids]
        return tuple(one for results in files for one in results)

    def embed(self, inputs: Prompt, **options: Unpack[EmbeddingOptions]) -> Embeddings:
        """Vectors of texts, or of lists of token ids."""
        return self._call(wire.embed(inputs, options))

    def models(self) -> tuple[Model, ...]:
        """The models that the server serves."""
        return self._call(wire.models())

    def tokenize(self, prompt: str | list[Message], **options: Unpack[TokenizationOptions]) -> Tokenization:
        """Token ids of a text, or of a conversation under the model's chat template."""
        return self._call(wire.tokenize(prompt, options))

    def detokenize(self, token_ids: list[int]) -> str:
        """The text that token ids stand for."""
        return self._call(wire.detokenize(token_ids))

    def server_info(self) -> ServerInfo:
        """What the server computes with."""
        return self._call(wire.server_info())

    def tokenizer_info(self) -> TokenizerInfo:
        """The tokenizer and the chat templates of the model."""
        return self._call(wire.tokenizer_info())

    def reset_prefix_cache(self) -> None:
        """Have later requests find no prefix of earlier ones."""
        self._call(wire.reset_prefix_cache())

    def load(self) -> int:
        """How many HTTP requests the server is answering."""
        return self._call(wire.load())

    def health(self) -> bool:
        """Whether the server takes requests (True), or is there but not ready (False).  Never tries twice."""
        return self._succeeds(wire.health(), 503)

    def ready(self) -> bool:
        """As `health`, and False too while so much waits that a request would be refused."""
        return self._succeeds(wire.ready(), 429, 503)

    def close(self) -> None:
        """Close all connections, those of unfinished streams included."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, call: wire.Call[T]) -> T:
        with self._response(call) as response:
            return call.parse(response.read(), response.headers)

    def _succeeds(self, call: wire.Call[None], *refusals: int) -> bool:
        """Whether the server does not answer with one of these statuses."""
        try:
            self._call(call)
        except StatusError as error:
            if error.status not in refusals:
                raise
            return False
        return True

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
