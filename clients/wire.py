"""The protocol without input and output: each operation as a `Call`, and how its answer is read.

The shapes are those of OpenAI's API reference (completions, chat completions, embeddings, models), with `/tokenize`,
`/detokenize` and `/health` as vLLM has them.  The synchronous and the asynchronous client both use this module.
"""

from __future__ import annotations

import json
import struct
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from shoal.clients.errors import BrokenConnectionError, ProtocolError, StatusError, StreamError, UnsendableError
from shoal.clients.formats import ResponseFormat, wire_format
from shoal.clients.tools import wire_choice, wire_tool
from shoal.clients.types import (
    ChatOptions,
    Choice,
    ChoiceDelta,
    Chunk,
    Completion,
    CompletionOptions,
    EmbeddingOptions,
    Embeddings,
    Message,
    Model,
    Prompt,
    Tokenization,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
"""Where `shoal serve` listens by default."""

_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, struct.error)
"""What reading JSON of another shape than expected raises."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One exchange with the server.

    Attributes:
        body: JSON in UTF-8; None for a GET.
        build: makes the result out of the decoded JSON of the answer, or of one event if the answer is a stream.
        retried: whether to try again when the server refuses.
        more_headers: besides those that every call has.
    """

    method: str
    path: str
    body: bytes | None
    build: Callable[[Any], T]
    retried: bool = True
    more_headers: dict[str, str] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        return ({} if self.body is None else {"Content-Type": "application/json"}) | self.more_headers

    def parse(self, data: bytes | str) -> T:
        """Read an answer.

        Raises:
            ProtocolError: it is not JSON, or lacks a field.
            StreamError: it is an error event.
        """
        try:
            return self.build(json.loads(data))
        except _MALFORMED as error:
            raise ProtocolError(
                f"{self.path} answered something else than expected ({error!r}): {_excerpt(data)}"
            ) from error


class EventReader(Generic[T]):
    """Reads the events of one stream up to [DONE].

    Attributes:
        is_done: whether it came.
    """

    def __init__(self, call: Call[T]) -> None:
        self._call = call
        self.is_done = False

    def read(self, data: str) -> Iterator[T]:
        """The result in one event's data, if it has one."""
        if data == "[DONE]":
            self.is_done = True
        elif not self.is_done:
            yield self._call.parse(data)

    def finish(self) -> None:
        """To be called when the connection ends.

        Raises:
            BrokenConnectionError: the stream had not ended.
        """
        if not self.is_done:
            raise BrokenConnectionError("the stream ended before the answer was whole (no [DONE] came)")


def complete(
    prompt: Prompt, options: CompletionOptions, response_format: ResponseFormat | None = None
) -> Call[Completion[Any]]:
    fields = {"prompt": prompt, **_wire_options(options, response_format)}
    return _post("/v1/completions", fields, partial(_completion, response_format))


def stream_complete(
    prompt: Prompt, options: CompletionOptions, response_format: ResponseFormat | None = None
) -> Call[Chunk]:
    return _post("/v1/completions", {"prompt": prompt, **_wire_options(options, response_format), **_STREAM}, _chunk)


def chat(
    messages: list[Message], options: ChatOptions, response_format: ResponseFormat | None = None
) -> Call[Completion[Any]]:
    fields = {"messages": messages, **_wire_options(options, response_format)}
    return _post("/v1/chat/completions", fields, partial(_completion, response_format))


def stream_chat(
    messages: list[Message], options: ChatOptions, response_format: ResponseFormat | None = None
) -> Call[Chunk]:
    fields = {"messages": messages, **_wire_options(options, response_format), **_STREAM}
    return _post("/v1/chat/completions", fields, _chunk)


def embed(inputs: Prompt, options: EmbeddingOptions) -> Call[Embeddings]:
    """Vectors come in base64, which is shorter than numbers and read faster."""
    return _post("/v1/embeddings", {"input": inputs, "encoding_format": "base64", **options}, _embeddings)


def models() -> Call[tuple[Model, ...]]:
    return Call("GET", "/v1/models", None, _models)


def tokenize(prompt: str | list[Message]) -> Call[Tokenization]:
    field = "prompt" if isinstance(prompt, str) else "messages"
    return _post("/tokenize", {field: prompt}, _tokenization)


def detokenize(token_ids: list[int]) -> Call[str]:
    return _post("/detokenize", {"tokens": token_ids}, lambda answer: str(answer["prompt"]))


def health() -> Call[None]:
    """The status is the answer; the body has no fixed shape and is not read."""
    return Call("GET", "/health", None, lambda _: None, retried=False)


def error_of(status: int, reason: str, body: bytes, retry_after: float | None) -> StatusError:
    """The error in a response whose status is not a success; a body of any other shape is quoted."""
    try:
        return StatusError(**_error_fields(json.loads(body)), status=status, retry_after=retry_after)
    except _MALFORMED:
        message = f"HTTP {status} {reason}: {_excerpt(body) or 'no message'}"
        return StatusError(message, status=status, retry_after=retry_after)


_STREAM = {"stream": True, "stream_options": {"include_usage": True}}


def _post(path: str, fields: dict[str, Any], build: Callable[[Any], T]) -> Call[T]:
    """A call with a JSON body.  NaN, infinity and half of a surrogate pair are refused: JSON in UTF-8 has none."""
    try:
        body = json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise UnsendableError(f"the request to {path} cannot be written as JSON: {error}") from error
    return Call("POST", path, body, build)


def _wire_options(options: Mapping[str, Any], response_format: ResponseFormat | None) -> dict[str, Any]:
    """The fields of a request; what may be a class or a function is JSON there."""
    fields = dict(options)
    if response_format is not None:
        fields["response_format"] = wire_format(response_format)
    if fields.get("tools") is not None:
        fields["tools"] = [wire_tool(tool) for tool in fields["tools"]]
    if fields.get("tool_choice") is not None:
        fields["tool_choice"] = wire_choice(fields["tool_choice"])
    return fields


def _completion(response_format: ResponseFormat | None, answer: Any) -> Completion[Any]:
    choices = tuple(
        Choice[Any](
            index=choice["index"],
            text=_text(said := _what_is_said(choice, "message")),
            finish_reason=choice["finish_reason"],
            logprobs=_logprobs(choice.get("logprobs")),
            tool_calls=tuple(map(_tool_call, said.get("tool_calls") or ())),
            reasoning=_reasoning(said),
            response_format=response_format,
        )
        for choice in answer["choices"]
    )
    return Completion(choices=choices, usage=_usage(answer["usage"]), **_origin(answer))


def _chunk(event: Any) -> Chunk:
    if "error" in event:
        raise StreamError(**_error_fields(event))
    choices = tuple(
        ChoiceDelta(
            index=choice["index"],
            text=_text(said := _what_is_said(choice, "delta")),
            finish_reason=choice.get("finish_reason"),
            logprobs=_logprobs(choice.get("logprobs")),
            tool_calls=tuple(_tool_call_delta(*each) for each in enumerate(said.get("tool_calls") or ())),
            reasoning=_reasoning(said),
        )
        for choice in event["choices"]
    )
    return Chunk(choices=choices, usage=_usage(event["usage"]) if event.get("usage") else None, **_origin(event))


def _origin(answer: Any) -> dict[str, Any]:
    """What an answer and each of its chunks say of where they come from, and their ends of how."""
    timing, told = answer.get("timing"), {name: answer.get(name) for name in ("seed", "receipt")}
    told["timing"] = None if timing is None else tuple(timing["choices"])
    return told | {name: answer[name] for name in ("id", "created", "model")}


def _what_is_said(choice: Any, chat_field: str) -> Any:
    """Where the text stands: a completion's in the choice itself, a chat's in a message or delta."""
    return choice if "text" in choice else choice[chat_field]


def _text(said: Any) -> str:
    """Null and absence mean none."""
    text = said["text"] if "text" in said else said.get("content") or ""
    if not isinstance(text, str):
        raise TypeError(f"the text of a choice is {type(text).__name__}")
    return text


def _reasoning(said: Any) -> str:
    """Under its usual name, or that of newer versions of vLLM."""
    return str(said.get("reasoning_content") or said.get("reasoning") or "")


def _tool_call(call: Any) -> ToolCall:
    function = call["function"]
    return ToolCall(str(call.get("id") or ""), function["name"], _arguments_json(function))


def _tool_call_delta(position: int, call: Any) -> ToolCallDelta:
    """`position` is that in its list: some servers give no index."""
    index = position if call.get("index") is None else int(call["index"])
    function = call.get("function") or {}
    return ToolCallDelta(index, call.get("id"), function.get("name"), _arguments_json(function))


def _arguments_json(function: Any) -> str:
    """Arguments are text; some servers give the object itself."""
    arguments = function.get("arguments") or ""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _logprobs(logprobs: Any) -> tuple[TokenLogprob, ...] | None:
    """Read the shape of chat (a list of records) or of completions (parallel lists)."""
    if logprobs is None:
        return None
    if "content" in logprobs:
        return tuple(
            TokenLogprob(
                entry["token"],
                entry["logprob"],
                tuple((top["token"], top["logprob"]) for top in entry.get("top_logprobs") or ()),
            )
            for entry in logprobs["content"] or ()
        )
    tokens = logprobs["tokens"]
    tops = logprobs.get("top_logprobs") or [None] * len(tokens)
    return tuple(
        TokenLogprob(token, logprob, tuple(sorted((top or {}).items(), key=lambda pair: -pair[1])))
        for token, logprob, top in zip(tokens, logprobs["token_logprobs"], tops, strict=True)
    )


def _usage(usage: Any) -> Usage:
    details = usage.get("prompt_tokens_details") or {}
    drafted = usage.get("completion_tokens_details") or {}
    return Usage(
        num_prompt_tokens=usage["prompt_tokens"],
        num_output_tokens=usage.get("completion_tokens", 0),
        num_cached_tokens=details.get("cached_tokens") or 0,
        num_accepted_tokens=drafted.get("accepted_prediction_tokens") or 0,
        num_rejected_tokens=drafted.get("rejected_prediction_tokens") or 0,
    )


def _embeddings(answer: Any) -> Embeddings:
    entries = sorted(answer["data"], key=lambda entry: int(entry["index"]))
    return Embeddings(answer["model"], tuple(_vector(one["embedding"]) for one in entries), _usage(answer["usage"]))


def _vector(embedding: Any) -> tuple[float, ...]:
    """Little-endian float32 in base64, or numbers: some servers know nothing else."""
    if isinstance(embedding, str):
        data = b64decode(embedding, validate=True)
        return struct.unpack(f"<{len(data) // 4}f", data)
    return tuple(map(float, embedding))


def _models(answer: Any) -> tuple[Model, ...]:
    return tuple(Model(m["id"], m["created"], m.get("max_model_len")) for m in answer["data"])


def _tokenization(answer: Any) -> Tokenization:
    return Tokenization(tuple(answer["tokens"]), answer["max_model_len"])


def _error_fields(answer: Any) -> dict[str, Any]:
    error = answer["error"]
    code = error.get("code")
    return {
        "message": str(error["message"]),
        "type": error.get("type"),
        "param": error.get("param"),
        "code": None if code is None else str(code),
    }


def _excerpt(data: bytes | str) -> str:
    text = data.decode(errors="replace") if isinstance(data, bytes) else data
    return text[:200].strip()
