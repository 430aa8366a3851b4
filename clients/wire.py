"""The protocol without input and output: each operation as a `Call`, and how its answer is read.

The paths are those of OpenAI's API reference (completions, chat completions, responses, embeddings, models, files,
batches) and of Anthropic's (messages), with those that vLLM has beside them.  The synchronous and the asynchronous
client both use this module.
"""

from __future__ import annotations

import json
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlencode

from shoal.clients import reading
from shoal.clients.batches import Batch, BatchLine, BatchResult, File, Page
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
from shoal.clients.errors import BrokenConnectionError, ProtocolError, StatusError, UnsendableError
from shoal.clients.formats import ResponseFormat, message_format, response_text, wire_format
from shoal.clients.tools import (
    Tool,
    ToolChoice,
    message_choice,
    message_tool,
    response_choice,
    response_tool,
    wire_choice,
    wire_tool,
)
from shoal.clients.types import (
    Answer,
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

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
"""Where `shoal serve` listens by default."""

_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, struct.error)
"""What reading JSON of another shape than expected raises."""


def checked(build: Callable[[Any], T], data: Any, source: str) -> T:
    """What `build` makes of data.

    Raises:
        ProtocolError: the data have another shape than `build` reads.
        StreamError: they are an error event.
    """
    try:
        return build(data)
    except _MALFORMED as error:
        raise ProtocolError(f"{source} answered something else than expected ({error!r}): {_excerpt(data)}") from error


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One exchange with the server.

    Attributes:
        body: JSON in UTF-8, unless `more_headers` say otherwise; None where there is none.
        build: makes the result out of the decoded answer, or of one event if the answer is a stream.
        decode: makes of the bytes of an answer what `build` takes.
        retried: whether to try again when the server refuses.
        more_headers: besides those that every call has.
        is_last: whether a result is the last of its stream; else [DONE] ends it.
        in_background: whether the server goes on with a stream that nobody reads.
        last_event_id: of the event behind which a stream begins, if it does not begin anew.
    """

    method: str
    path: str
    body: bytes | None
    build: Callable[[Any], T]
    decode: Callable[[Any], Any] = json.loads
    retried: bool = True
    more_headers: dict[str, str] = field(default_factory=dict)
    is_last: Callable[[T], bool] = lambda _: False
    in_background: bool = False
    last_event_id: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return ({} if self.body is None else {"Content-Type": "application/json"}) | self.more_headers

    def parse(self, data: bytes | str, headers: Mapping[str, str] | None = None) -> T:
        """Read an answer.

        Args:
            headers: of the answer, with names in lower case.

        Raises:
            ProtocolError: it is not JSON, or lacks a field.
            StreamError: it is an error event.
        """
        result = checked(lambda told: self.build(self.decode(told)), data, self.path)
        if headers and isinstance(result, Answer):
            ignored = headers.get("x-ignored-fields", "")
            fields = tuple(ignored.split(", ")) if ignored else ()
            return replace(result, request_id=headers.get("x-request-id"), ignored_fields=fields)
        return result


class EventReader(Generic[T]):
    """Reads the events of one stream up to its last, or to [DONE].

    Attributes:
        headers: of the answer.
        is_done: whether the last event came.
    """

    def __init__(self, call: Call[T]) -> None:
        self._call = call
        self.headers: Mapping[str, str] = {}
        self.is_done = False

    def read(self, data: str) -> Iterator[T]:
        """The result in one event's data, if it has one."""
        if data == "[DONE]":
            self.is_done = True
        elif not self.is_done:
            result = self._call.parse(data, self.headers)
            self.is_done = self._call.is_last(result)
            yield result

    def finish(self) -> None:
        """To be called when the connection ends.

        Raises:
            BrokenConnectionError: the stream had not ended.
        """
        if not self.is_done:
            raise BrokenConnectionError(
                "the stream ended before the answer was whole (no [DONE] came, nor what ends it)"
            )


# -- completions and chats -----------------------------------------------------------------------------------------


def complete(
    prompt: Prompt, options: CompletionOptions, response_format: ResponseFormat | None = None
) -> Call[Completion[Any]]:
    fields = {"prompt": prompt, **_wire_options(options, response_format)}
    return _post("/v1/completions", fields, partial(reading.completion, response_format))


def stream_complete(
    prompt: Prompt, options: CompletionOptions, response_format: ResponseFormat | None = None
) -> Call[Chunk]:
    fields = {"prompt": prompt, **_wire_options(options, response_format), **_STREAM}
    return _post("/v1/completions", fields, reading.chunk)


def chat(
    messages: list[Message], options: ChatOptions, response_format: ResponseFormat | None = None
) -> Call[Completion[Any]]:
    fields = {"messages": messages, **_wire_options(options, response_format)}
    return _post("/v1/chat/completions", fields, partial(reading.completion, response_format))


def stream_chat(
    messages: list[Message], options: ChatOptions, response_format: ResponseFormat | None = None
) -> Call[Chunk]:
    fields = {"messages": messages, **_wire_options(options, response_format), **_STREAM}
    return _post("/v1/chat/completions", fields, reading.chunk)


# -- responses -----------------------------------------------------------------------------------------------------


def respond(
    input: ResponseInput, options: ResponseOptions, response_format: ResponseFormat | None = None
) -> Call[Response]:
    fields = {"input": input, **_response_options(options, response_format)}
    return _post("/v1/responses", fields, partial(reading.response, response_format))


def stream_respond(
    input: ResponseInput, options: ResponseOptions, response_format: ResponseFormat | None = None
) -> Call[ResponseEvent]:
    fields = {"input": input, **_response_options(options, response_format), "stream": True}
    call = _post("/v1/responses", fields, partial(reading.response_event, response_format))
    return replace(call, is_last=_ends, in_background=bool(fields.get("background")))


def response(response_id: str) -> Call[Response]:
    return _get(_path("responses", response_id), partial(reading.response, None))


def stream_response(response_id: str, starting_after: int | None) -> Call[ResponseEvent]:
    query: dict[str, Any] = {"stream": "true"}
    if starting_after is not None:
        query["starting_after"] = starting_after
    call = _get(_path("responses", response_id), partial(reading.response_event, None), query)
    num_read = 0 if starting_after is None else starting_after + 1
    return replace(
        call,
        is_last=_ends,
        in_background=True,
        last_event_id=f"{response_id}:{num_read}",
    )


def cancel_response(response_id: str) -> Call[Response]:
    return Call("POST", _path("responses", response_id, "cancel"), None, partial(reading.response, None))


def delete_response(response_id: str) -> Call[None]:
    return _delete(_path("responses", response_id))


def input_items(response_id: str, options: Mapping[str, Any]) -> Call[Page[Item]]:
    entries: Callable[[Any], Page[Item]] = partial(reading.page, lambda item: item)
    return _get(_path("responses", response_id, "input_items"), entries, options)


def count_input_tokens(input: ResponseInput, options: ResponseOptions) -> Call[int]:
    fields = {"input": input, **_response_options(options, None)}
    return _post("/v1/responses/input_tokens", fields, _input_tokens)


# -- messages ------------------------------------------------------------------------------------------------------


def message(
    messages: Sequence[Message], options: MessageOptions, response_format: ResponseFormat | None = None
) -> Call[MessageAnswer]:
    fields = {"messages": messages, **_message_options(options, response_format)}
    return _post("/v1/messages", fields, partial(reading.message, response_format))


def stream_message(
    messages: Sequence[Message], options: MessageOptions, response_format: ResponseFormat | None = None
) -> Call[MessageEvent]:
    fields = {"messages": messages, **_message_options(options, response_format), "stream": True}
    return replace(_post("/v1/messages", fields, reading.message_event), is_last=_ends)


def count_tokens(messages: Sequence[Message], options: MessagePrompt) -> Call[int]:
    fields = {"messages": messages, **_message_options(options, None)}
    return _post("/v1/messages/count_tokens", fields, _input_tokens)


# -- files and batches ---------------------------------------------------------------------------------------------


def upload(lines: bytes | Sequence[BatchLine], filename: str) -> Call[File]:
    """A form, which JSON is not: the lines as they are, or of requests."""
    if not isinstance(lines, bytes):
        lines = b"".join(_json("/v1/files", line) + b"\n" for line in lines)
    boundary = secrets.token_hex(16)
    name = filename.translate({ord(sign): f"%{ord(sign):02X}" for sign in '"\r\n'})
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
        f"Content-Type: application/octet-stream\r\n\r\n"
    ).encode(errors="replace") + b"%b\r\n--%b--\r\n" % (lines, boundary.encode())
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return Call("POST", "/v1/files", body, partial(reading.record, File), more_headers=headers)


def files(options: Mapping[str, Any]) -> Call[Page[File]]:
    return _get("/v1/files", partial(reading.page, partial(reading.record, File)), options)


def file(file_id: str) -> Call[File]:
    return _get(_path("files", file_id), partial(reading.record, File))


def file_content(file_id: str) -> Call[bytes]:
    return Call("GET", _path("files", file_id, "content"), None, bytes, decode=bytes)


def delete_file(file_id: str) -> Call[None]:
    return _delete(_path("files", file_id))


def create_batch(
    input_file_id: str, endpoint: str, completion_window: str, metadata: dict[str, str] | None
) -> Call[Batch]:
    fields = {"input_file_id": input_file_id, "endpoint": endpoint, "completion_window": completion_window}
    return _post("/v1/batches", fields if metadata is None else fields | {"metadata": metadata}, reading.batch)


def batches(options: Mapping[str, Any]) -> Call[Page[Batch]]:
    return _get("/v1/batches", partial(reading.page, reading.batch), options)


def batch(batch_id: str) -> Call[Batch]:
    return _get(_path("batches", batch_id), reading.batch)


def cancel_batch(batch_id: str) -> Call[Batch]:
    return Call("POST", _path("batches", batch_id, "cancel"), None, reading.batch)


def batch_results(file_id: str) -> Call[tuple[BatchResult, ...]]:
    return Call("GET", _path("files", file_id, "content"), None, reading.batch_results, decode=_json_lines)


# -- the rest ------------------------------------------------------------------------------------------------------


def embed(inputs: Prompt, options: EmbeddingOptions) -> Call[Embeddings]:
    """Vectors come in base64, which is shorter than numbers and read faster."""
    return _post("/v1/embeddings", {"input": inputs, "encoding_format": "base64", **options}, reading.embeddings)


def models() -> Call[tuple[Model, ...]]:
    return _get("/v1/models", reading.models)


def tokenize(prompt: str | list[Message], options: TokenizationOptions) -> Call[Tokenization]:
    field = "prompt" if isinstance(prompt, str) else "messages"
    return _post("/tokenize", {field: prompt, **_wire_options(options, None)}, reading.tokenization)


def detokenize(token_ids: list[int]) -> Call[str]:
    return _post("/detokenize", {"tokens": token_ids}, lambda answer: str(answer["prompt"]))


def server_info() -> Call[ServerInfo]:
    return _get("/server_info", partial(reading.record, ServerInfo))


def tokenizer_info() -> Call[TokenizerInfo]:
    return _get("/tokenizer_info", partial(reading.record, TokenizerInfo))


def reset_prefix_cache() -> Call[None]:
    return Call("POST", "/reset_prefix_cache", None, _nothing, decode=_nothing)


def load() -> Call[int]:
    return _get("/load", lambda answer: int(answer["server_load"]))


def health() -> Call[None]:
    """The status is the answer; the body has no fixed shape and is not read."""
    return Call("GET", "/health", None, _nothing, decode=_nothing, retried=False)


def ready() -> Call[None]:
    """As `health`."""
    return Call("GET", "/ready", None, _nothing, decode=_nothing, retried=False)


def error_of(status: int, reason: str, body: bytes, retry_after: float | None) -> StatusError:
    """The error in a response whose status is not a success; a body of any other shape is quoted."""
    try:
        return StatusError(**reading.error_fields(json.loads(body)), status=status, retry_after=retry_after)
    except _MALFORMED:
        message = f"HTTP {status} {reason}: {_excerpt(body) or 'no message'}"
        return StatusError(message, status=status, retry_after=retry_after)


# -- how calls are made --------------------------------------------------------------------------------------------

_STREAM = {"stream": True, "stream_options": {"include_usage": True}}


def _post(path: str, fields: dict[str, Any], build: Callable[[Any], T]) -> Call[T]:
    """A call with a JSON body."""
    return Call("POST", path, _json(path, fields), build)


def _get(path: str, build: Callable[[Any], T], query: Mapping[str, Any] | None = None) -> Call[T]:
    return Call("GET", f"{path}?{urlencode(query)}" if query else path, None, build)


def _delete(path: str) -> Call[None]:
    return Call("DELETE", path, None, _nothing, decode=_nothing)


def _path(*parts: str) -> str:
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


def _json(path: str, value: Mapping[str, Any]) -> bytes:
    """NaN, infinity and half of a surrogate pair are refused: JSON in UTF-8 has none."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise UnsendableError(f"the request to {path} cannot be written as JSON: {error}") from error


def _wire_options(options: Mapping[str, Any], response_format: ResponseFormat | None) -> dict[str, Any]:
    """The fields of a request; what may be a class or a function is JSON there."""
    fields = _with_tools(options, wire_tool, wire_choice)
    if response_format is not None:
        fields["response_format"] = wire_format(response_format)
    return fields


def _response_options(options: Mapping[str, Any], response_format: ResponseFormat | None) -> dict[str, Any]:
    fields = _with_tools(options, response_tool, response_choice)
    if response_format is not None:
        fields["text"] = {**fields.get("text", {}), "format": response_text(response_format)}
    return fields


def _message_options(options: Mapping[str, Any], response_format: ResponseFormat | None) -> dict[str, Any]:
    fields = _with_tools(options, message_tool, message_choice)
    if response_format is not None:
        fields["output_config"] = {**fields.get("output_config", {}), "format": message_format(response_format)}
    return fields


def _with_tools(
    options: Mapping[str, Any], tool: Callable[[Tool], Any], choice: Callable[[ToolChoice], Any]
) -> dict[str, Any]:
    fields = dict(options)
    if fields.get("tools") is not None:
        fields["tools"] = [tool(one) for one in fields["tools"]]
    if fields.get("tool_choice") is not None:
        fields["tool_choice"] = choice(fields["tool_choice"])
    return fields


# -- how answers are read ------------------------------------------------------------------------------------------


def _ends(event: ResponseEvent | MessageEvent) -> bool:
    return event.is_last


def _input_tokens(answer: Any) -> int:
    return int(answer["input_tokens"])


def _json_lines(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.splitlines() if line]


def _nothing(_: Any) -> None:
    """What is not read."""


def _excerpt(data: Any) -> str:
    text = data.decode(errors="replace") if isinstance(data, bytes) else str(data)
    return text[:200].strip()
