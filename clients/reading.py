"""What answers say: their JSON as the types that users get.

The shapes are those of OpenAI's and Anthropic's API references, as far as the types have them.  What an answer lacks
raises whatever reading it raises, which `wire.Call.parse` makes a `ProtocolError` of.
"""

from __future__ import annotations

import json
import struct
from base64 import b64decode
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

from shoal.clients.batches import Batch, BatchResult, Page, RequestCounts
from shoal.clients.conversations import MessageAnswer, MessageEvent, Response, ResponseEvent
from shoal.clients.errors import ApiError, StatusError, StreamError
from shoal.clients.formats import ResponseFormat
from shoal.clients.types import (
    Capabilities,
    Choice,
    ChoiceDelta,
    Chunk,
    Completion,
    Embeddings,
    Model,
    PromptLogprobs,
    Tokenization,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)

T = TypeVar("T")

# -- completions and chats -----------------------------------------------------------------------------------------


def completion(response_format: ResponseFormat | None, answer: Any) -> Completion[Any]:
    choices = tuple(
        Choice[Any](
            index=choice["index"],
            text=_text(said := _what_is_said(choice, "message")),
            finish_reason=choice["finish_reason"],
            logprobs=_logprobs(choice.get("logprobs")),
            tool_calls=tuple(map(_tool_call, said.get("tool_calls") or ())),
            reasoning=_reasoning(said),
            token_ids=_maybe_tuple(choice.get("token_ids")),
            prompt_token_ids=_maybe_tuple(choice.get("prompt_token_ids", answer.get("prompt_token_ids"))),
            prompt_logprobs=_prompt_logprobs(choice.get("prompt_logprobs", answer.get("prompt_logprobs"))),
            response_format=response_format,
        )
        for choice in answer["choices"]
    )
    return Completion(choices=choices, usage=_usage(answer["usage"]), **_origin(answer))


def chunk(event: Any) -> Chunk:
    raise_told_error(event)
    choices = tuple(
        ChoiceDelta(
            index=choice["index"],
            text=_text(said := _what_is_said(choice, "delta")),
            finish_reason=choice.get("finish_reason"),
            logprobs=_logprobs(choice.get("logprobs")),
            tool_calls=tuple(_tool_call_delta(*each) for each in enumerate(said.get("tool_calls") or ())),
            reasoning=_reasoning(said),
            token_ids=_maybe_tuple(choice.get("token_ids")),
            prompt_token_ids=_maybe_tuple(choice.get("prompt_token_ids", event.get("prompt_token_ids"))),
        )
        for choice in event["choices"]
    )
    return Chunk(choices=choices, usage=_usage(event["usage"]) if event.get("usage") else None, **_origin(event))


def _origin(answer: Any) -> dict[str, Any]:
    """What an answer and each of its chunks say of where they come from, and their ends of how."""
    told = {name: answer.get(name) for name in ("seed", "system_fingerprint")}
    return told | _explained(answer) | {name: answer[name] for name in ("id", "created", "model")}


def _explained(answer: Any) -> dict[str, Any]:
    timing = answer.get("timing")
    return {"timing": None if timing is None else tuple(timing["choices"]), "receipt": answer.get("receipt")}


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


def _prompt_logprobs(logprobs: Any) -> PromptLogprobs | None:
    if logprobs is None:
        return None
    return tuple(place and {int(token_id): one for token_id, one in place.items()} for place in logprobs)


def _usage(usage: Any) -> Usage:
    details = usage.get("prompt_tokens_details") or {}
    output = usage.get("completion_tokens_details") or {}
    return Usage(
        num_prompt_tokens=usage["prompt_tokens"],
        num_output_tokens=usage.get("completion_tokens", 0),
        num_cached_tokens=details.get("cached_tokens") or 0,
        num_accepted_tokens=output.get("accepted_prediction_tokens") or 0,
        num_rejected_tokens=output.get("rejected_prediction_tokens") or 0,
        num_reasoning_tokens=output.get("reasoning_tokens") or 0,
    )


def embeddings(answer: Any) -> Embeddings:
    entries = sorted(answer["data"], key=lambda entry: int(entry["index"]))
    return Embeddings(answer["model"], tuple(_vector(one["embedding"]) for one in entries), _usage(answer["usage"]))


def _vector(embedding: Any) -> tuple[float, ...]:
    """Little-endian float32 in base64, or numbers: some servers know nothing else."""
    if isinstance(embedding, str):
        data = b64decode(embedding, validate=True)
        return struct.unpack(f"<{len(data) // 4}f", data)
    return tuple(map(float, embedding))


def models(answer: Any) -> tuple[Model, ...]:
    return tuple(map(_model, answer["data"]))


def _model(answer: Any) -> Model:
    told = answer.get("capabilities")
    capabilities = None if told is None else record(Capabilities, told)
    return Model(answer["id"], answer["created"], answer.get("max_model_len"), capabilities)


def tokenization(answer: Any) -> Tokenization:
    return Tokenization(tuple(answer["tokens"]), answer["max_model_len"], _maybe_tuple(answer.get("token_strs")))


# -- responses and messages ----------------------------------------------------------------------------------------


def response(response_format: ResponseFormat | None, answer: Any) -> Response:
    usage = answer.get("usage")
    told = {name: answer.get(name) for name in ("error", "incomplete_details", "previous_response_id", "seed")}
    return Response(
        id=answer["id"],
        created=answer["created_at"],
        model=answer["model"],
        status=answer["status"],
        output=tuple(answer["output"]),
        usage=None if usage is None else _response_usage(usage),
        metadata=answer.get("metadata") or {},
        response_format=response_format,
        **told,
        **_explained(answer),
    )


def response_event(response_format: ResponseFormat | None, event: Any) -> ResponseEvent:
    raise_told_error(event)
    told = event.get("response")
    so_far = None if told is None else response(response_format, told)
    return ResponseEvent(event["type"], event, event["sequence_number"], so_far)


def _response_usage(usage: Any) -> Usage:
    return Usage(
        num_prompt_tokens=usage["input_tokens"],
        num_output_tokens=usage["output_tokens"],
        num_cached_tokens=(usage.get("input_tokens_details") or {}).get("cached_tokens") or 0,
        num_reasoning_tokens=(usage.get("output_tokens_details") or {}).get("reasoning_tokens") or 0,
    )


def message(response_format: ResponseFormat | None, answer: Any) -> MessageAnswer:
    return MessageAnswer(
        id=answer["id"],
        model=answer["model"],
        blocks=tuple(answer["content"]),
        stop_reason=answer["stop_reason"],
        stop_sequence=answer.get("stop_sequence"),
        usage=_message_usage(answer["usage"]),
        response_format=response_format,
        **_explained(answer),
    )


def message_event(event: Any) -> MessageEvent:
    raise_told_error(event)
    return MessageEvent(event["type"], event)


def message_of_events(response_format: ResponseFormat | None, events: Sequence[MessageEvent]) -> MessageAnswer:
    """The message that was streamed.  An input that was cut off is put down as Anthropic's documentation has it."""
    answer: dict[str, Any] = {}
    pieces: list[dict[str, list[str]]] = []
    for data in (event.data for event in events):
        match data["type"]:
            case "message_start":
                answer = {**data["message"], "content": []}
            case "content_block_start":
                answer["content"].append(dict(data["content_block"]))
                pieces.append({})
            case "content_block_delta":
                for name in data["delta"].keys() - {"type"}:
                    pieces[data["index"]].setdefault(name, []).append(data["delta"][name])
            case "message_delta":
                answer |= data["delta"] | {name: data[name] for name in ("timing", "receipt") if name in data}
                answer["usage"] = {**answer["usage"], **data["usage"]}
    for block, gained in zip(answer["content"], pieces, strict=True):
        for name, parts in gained.items():
            if name == "partial_json":
                block["input"] = _input("".join(parts))
            else:
                block[name] = block.get(name, "") + "".join(parts)
    return message(response_format, answer)


def _input(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"INVALID_JSON": text}


def _message_usage(usage: Any) -> Usage:
    """Tokens that the prefix cache had, or got, are not among `input_tokens`."""
    num_cached = usage.get("cache_read_input_tokens") or 0
    num_stored = usage.get("cache_creation_input_tokens") or 0
    return Usage(usage["input_tokens"] + num_cached + num_stored, usage["output_tokens"], num_cached)


# -- files and batches ---------------------------------------------------------------------------------------------


def page(entry: Callable[[Any], T], answer: Any) -> Page[T]:
    return Page(tuple(map(entry, answer["data"])), answer["has_more"], answer.get("last_id"))


def batch(answer: Any) -> Batch:
    counts = record(RequestCounts, answer["request_counts"])
    errors = tuple((answer.get("errors") or {}).get("data") or ())
    return record(Batch, {**answer, "request_counts": counts, "errors": errors})


def batch_results(lines: Any) -> tuple[BatchResult, ...]:
    return tuple(map(_batch_result, lines))


def _batch_result(line: Any) -> BatchResult:
    custom_id, told = line["custom_id"], line["response"]
    if told is None:
        return BatchResult(custom_id, error=ApiError(**error_fields(line)))
    body = told["body"]
    if told["status_code"] != 200:
        return BatchResult(custom_id, error=StatusError(**error_fields(body), status=told["status_code"]))
    return BatchResult(custom_id, _BODIES[body["object"]](body))


_BODIES: dict[str, Callable[[Any], Completion[Any] | Response | Embeddings]] = {
    "text_completion": partial(completion, None),
    "chat.completion": partial(completion, None),
    "response": partial(response, None),
    "list": embeddings,
}


# -- all of them ---------------------------------------------------------------------------------------------------


def record(kind: type[T], answer: Any) -> T:
    """A dataclass whose fields have the names that they have in JSON."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in answer.items() if name in names})


def raise_told_error(event: Any) -> None:
    """Raise the error that an event of a stream tells of."""
    if event.get("error"):
        raise StreamError(**error_fields(event))


def error_fields(answer: Any) -> dict[str, Any]:
    error = answer["error"]
    code = error.get("code")
    return {
        "message": str(error["message"]),
        "type": error.get("type"),
        "param": error.get("param"),
        "code": None if code is None else str(code),
    }


def _maybe_tuple(values: Any) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)
