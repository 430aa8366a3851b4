"""The table of the operations: one entry for each route, which says what its types do not.

A new route needs an entry here; its types, limits, defaults and errors come from where they are declared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.scheduler.errors import ContextLengthError, EngineError, InvalidRequestError, QueueFullError, ShoalError
from shoal.server.errors import (
    OPENAI,
    BatchesUnavailableError,
    BodyTooLargeError,
    ErrorShape,
    IdempotencyKeyReuseError,
    ModelNotFoundError,
    NotFoundError,
    RateLimitError,
    RequestTimeoutError,
    StreamExpiredError,
)
from shoal.server.openapi import examples
from shoal.server.wire.batches import (
    MAX_FILE_BYTES,
    MAX_NAME_CHARS,
    Batch,
    BatchBody,
    BatchQuery,
    Deleted,
    FileObject,
    FileQuery,
    Page,
)
from shoal.server.wire.body import Body
from shoal.server.wire.requests import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from shoal.server.wire.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    DetokenizeResult,
    ModelCard,
    ModelList,
    ServerInfo,
    TokenizeResult,
)


@dataclass(frozen=True, kw_only=True)
class Events:
    """What a stream is made of.

    Attributes:
        types: of the data of its events, one or several, by their names; streams of OpenAI's first API have no names.
        example: the data of a whole stream, each with its event's name.
    """

    types: Mapping[str, Any]
    example: Sequence[tuple[str, object]]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What the document says of a route.

    Attributes:
        body: type of the request's JSON, `bodies` examples of it by name.
        form: schema of a form, for a request that is no JSON.
        query: type of what the query may have.
        headers: names of what a request's head may have, and of what an answer's head may have.
        answer: type of the answer's JSON, or several; a mapping is its schema.
        example: an answer.
        texts: an example for each media type of an answer that is no JSON.
        events: of the stream that the answer is, or may be.
        is_empty: whether an answer may be 204.
        errors: what may go wrong, beside what may with any request.
        shape: of errors.
    """

    tag: str
    summary: str
    description: str = ""
    body: type[Body] | None = None
    bodies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    form: Mapping[str, Any] | None = None
    query: type[Body] | None = None
    headers: Sequence[str] = ()
    answer: Any = None
    example: object = None
    texts: Mapping[str, str] = field(default_factory=dict)
    events: Events | None = None
    is_empty: bool = False
    errors: Sequence[type[ShoalError]] = ()
    shape: ErrorShape = OPENAI


GENERATION_HEADERS = (
    "Idempotency-Key",
    "Last-Event-ID",
    "X-Stream-Resume",
    "X-Request-Timeout",
    "x-seed",
    "x-stream-resume",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
)
BODY_ERRORS = (InvalidRequestError, BodyTooLargeError)
GENERATION_ERRORS = (
    *BODY_ERRORS,
    ContextLengthError,
    ModelNotFoundError,
    RequestTimeoutError,
    StreamExpiredError,
    IdempotencyKeyReuseError,
    QueueFullError,
    RateLimitError,
    EngineError,
)
_FILE_ERRORS = (NotFoundError, BatchesUnavailableError)
_UPLOAD = f"at most {MAX_FILE_BYTES // 2**20} MiB, with a name of at most {MAX_NAME_CHARS} characters"
_NO_CONTENT = "The answer has no content: its status says all."

TAGS = {
    "Generation": "Text from a prompt or a conversation, whole or as a stream of server-sent events.",
    "Streams": "Streams that outlive their connection.",
    "Models": "What is served, and how.",
    "Tokens": "Text to tokens, tokens to text.",
    "Batches": "Files with a request a line, which are answered while nobody else needs the engine.",
    "Operations": "For those who run the server.",
}

OPERATIONS: Mapping[str, Operation] = {
    "POST /v1/completions": Operation(
        tag="Generation",
        summary="Continue a prompt",
        body=CompletionBody,
        bodies=examples.COMPLETION_BODIES,
        headers=GENERATION_HEADERS,
        answer=Completion,
        example=examples.COMPLETION,
        events=Events(types={"": Completion}, example=examples.COMPLETION_EVENTS),
        is_empty=True,
        errors=GENERATION_ERRORS,
    ),
    "POST /v1/chat/completions": Operation(
        tag="Generation",
        summary="Answer a conversation",
        body=ChatBody,
        bodies=examples.CHAT_BODIES,
        headers=GENERATION_HEADERS,
        answer=ChatCompletion,
        example=examples.CHAT,
        events=Events(types={"": ChatCompletionChunk}, example=examples.CHAT_EVENTS),
        is_empty=True,
        errors=GENERATION_ERRORS,
    ),
    "GET /v1/streams/{stream_id}": Operation(
        tag="Streams",
        summary="Go on with an answer",
        description="Gives what follows the event that `Last-Event-ID` names, and then what comes.  It takes over: a "
        "connection on which the stream is still sent ends.  After the last event the answer is 204.",
        headers=("Last-Event-ID", "x-seed", "x-stream-resume"),
        answer=(Completion, ChatCompletion),
        example=examples.CHAT,
        events=Events(types={"": (Completion, ChatCompletionChunk)}, example=examples.CHAT_EVENTS),
        is_empty=True,
        errors=(InvalidRequestError, NotFoundError, RequestTimeoutError, StreamExpiredError, EngineError),
    ),
    "DELETE /v1/streams/{stream_id}": Operation(
        tag="Streams",
        summary="End an answer at once",
        is_empty=True,
        errors=(NotFoundError,),
    ),
    "GET /v1/models": Operation(tag="Models", summary="List what is served", answer=ModelList, example=examples.MODELS),
    "GET /v1/models/{name}": Operation(
        tag="Models",
        summary="Get a model",
        answer=ModelCard,
        example=examples.MODEL,
        errors=(ModelNotFoundError,),
    ),
    "GET /server_info": Operation(
        tag="Models",
        summary="Get the limits and settings of the server",
        answer=ServerInfo,
        example=examples.SERVER_INFO,
    ),
    "POST /tokenize": Operation(
        tag="Tokens",
        summary="Make tokens of a text or of a conversation",
        body=TokenizeBody,
        bodies=examples.TOKENIZE_BODIES,
        answer=TokenizeResult,
        example=examples.TOKENIZED,
        errors=(*BODY_ERRORS, ModelNotFoundError),
    ),
    "POST /detokenize": Operation(
        tag="Tokens",
        summary="Make a text of tokens",
        body=DetokenizeBody,
        bodies=examples.DETOKENIZE_BODIES,
        answer=DetokenizeResult,
        example=examples.DETOKENIZED,
        errors=(*BODY_ERRORS, ModelNotFoundError),
    ),
    "POST /v1/files": Operation(
        tag="Batches",
        summary="Upload a file of requests",
        form={
            "type": "object",
            "properties": {
                "file": {"contentMediaType": "application/octet-stream", "description": _UPLOAD},
                "purpose": {"const": "batch"},
            },
            "required": ["file", "purpose"],
            "additionalProperties": False,
        },
        answer=FileObject,
        example=examples.FILE,
        errors=(*BODY_ERRORS, BatchesUnavailableError),
    ),
    "GET /v1/files": Operation(
        tag="Batches",
        summary="List files, the newest first",
        query=FileQuery,
        answer=Page[FileObject],
        example=examples.FILES,
        errors=(InvalidRequestError, *_FILE_ERRORS),
    ),
    "GET /v1/files/{file_id}": Operation(
        tag="Batches",
        summary="Get what is known of a file",
        answer=FileObject,
        example=examples.FILE,
        errors=_FILE_ERRORS,
    ),
    "DELETE /v1/files/{file_id}": Operation(
        tag="Batches", summary="Delete a file", answer=Deleted, example=examples.DELETED, errors=_FILE_ERRORS
    ),
    "GET /v1/files/{file_id}/content": Operation(
        tag="Batches",
        summary="Download a file",
        texts={"application/octet-stream": examples.LINES},
        errors=_FILE_ERRORS,
    ),
    "POST /v1/batches": Operation(
        tag="Batches",
        summary="Make a batch of a file",
        body=BatchBody,
        bodies=examples.BATCH_BODIES,
        answer=Batch,
        example=examples.BATCH,
        errors=(*BODY_ERRORS, *_FILE_ERRORS),
    ),
    "GET /v1/batches": Operation(
        tag="Batches",
        summary="List batches, the newest first",
        query=BatchQuery,
        answer=Page[Batch],
        example=examples.BATCHES,
        errors=(InvalidRequestError, *_FILE_ERRORS),
    ),
    "GET /v1/batches/{batch_id}": Operation(
        tag="Batches", summary="Get a batch", answer=Batch, example=examples.BATCH, errors=_FILE_ERRORS
    ),
    "POST /v1/batches/{batch_id}/cancel": Operation(
        tag="Batches",
        summary="Cancel a batch",
        answer=Batch,
        example=examples.BATCH,
        errors=(InvalidRequestError, *_FILE_ERRORS),
    ),
    "GET /health": Operation(
        tag="Operations", summary="Tell whether steps complete, or nothing is asked", description=_NO_CONTENT
    ),
    "GET /ready": Operation(
        tag="Operations",
        summary="Tell whether a request would be taken",
        description=_NO_CONTENT,
        errors=(QueueFullError,),
    ),
    "GET /live": Operation(tag="Operations", summary="Tell that the port is open", description=_NO_CONTENT),
    "GET /ping": Operation(tag="Operations", summary="As `/health`, for SageMaker", description=_NO_CONTENT),
    "POST /ping": Operation(tag="Operations", summary="As `/health`, for SageMaker", description=_NO_CONTENT),
    "GET /load": Operation(
        tag="Operations",
        summary="Count the HTTP requests that are being answered",
        answer={"type": "object", "properties": {"server_load": {"type": "integer"}}, "required": ["server_load"]},
        example={"server_load": 3},
    ),
    "GET /metrics": Operation(
        tag="Operations",
        summary="Get the metrics for Prometheus",
        description="In the format that `Accept` asks for.",
        texts={
            "text/plain": examples.METRICS,
            "application/openmetrics-text": examples.METRICS + "# EOF\n",
        },
    ),
    "GET /version": Operation(
        tag="Operations",
        summary="Get the version of Shoal",
        answer={"type": "object", "properties": {"version": {"type": "string"}}, "required": ["version"]},
        example={"version": "0.1.0"},
    ),
    "GET /openapi.json": Operation(
        tag="Operations",
        summary="Get this document",
        answer={"type": "object", "required": ["openapi", "info", "paths"]},
    ),
    "GET /docs": Operation(
        tag="Operations",
        summary="Read this document as a page",
        texts={"text/html": "<!doctype html>..."},
    ),
}
