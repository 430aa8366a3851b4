"""The table of the operations: one entry for each route, which says what its types do not.

A new route needs an entry here; its types, limits, defaults and errors come from where they are declared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from shoal.scheduler.errors import ContextLengthError, EngineError, InvalidRequestError, QueueFullError, ShoalError
from shoal.server.engine.event_log import Lost, SeenStep, Snapshot
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
from shoal.server.routes.engine import EVENTS_SHAPE
from shoal.server.routes.responses import STREAM_SHAPE
from shoal.server.shapes import anthropic
from shoal.server.wire import item_events, message_answers
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
from shoal.server.wire.embeddings import Embeddings, EmbeddingsBody
from shoal.server.wire.engine import EngineQuery, Load, LoadBody, Loads, PlanBody, Planned, RequestTokens, StepsBody
from shoal.server.wire.items import (
    DeletedResponse,
    InputTokens,
    ItemPage,
    ItemsQuery,
    ResponseObject,
    ResponseQuery,
    ResponsesBody,
)
from shoal.server.wire.message_answers import MessageAnswer, TokenCount
from shoal.server.wire.messages import CountBody, MessagesBody
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
    TokenizerInfo,
)


@dataclass(frozen=True, kw_only=True)
class Events:
    """What a stream is made of.

    Attributes:
        types: of the data of its events, one or several, by their names; streams of OpenAI's first API have no names.
        example: the data of a whole stream, each with its event's name.
        shapes: of errors and of the end, one for each API whose stream it may be; the example is of the first.
        example_id: the `id` of the answer that it is of, if it is one of a stream that can go on.
    """

    types: Mapping[str, Any]
    example: Sequence[tuple[str, object]]
    shapes: Sequence[ErrorShape] = (OPENAI,)
    example_id: str = ""


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
        shape: of errors, but for those in streams.
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


_TERMS_HEADERS = (
    "X-Request-Timeout",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
)
GENERATION_HEADERS = (
    "X-Shoal-Timing",
    "Idempotency-Key",
    "Last-Event-ID",
    "X-Stream-Resume",
    "x-seed",
    "x-stream-resume",
    *_TERMS_HEADERS,
)
BODY_ERRORS = (InvalidRequestError, BodyTooLargeError)
_WORK_ERRORS = (
    *BODY_ERRORS,
    ContextLengthError,
    ModelNotFoundError,
    RequestTimeoutError,
    QueueFullError,
    RateLimitError,
    EngineError,
)
GENERATION_ERRORS = (*_WORK_ERRORS, StreamExpiredError, IdempotencyKeyReuseError)
_FILE_ERRORS = (NotFoundError, BatchesUnavailableError)
_UPLOAD = f"at most {MAX_FILE_BYTES // 2**20} MiB, with a name of at most {MAX_NAME_CHARS} characters"
_NO_CONTENT = "The answer has no content: its status says all."

ANTHROPIC = anthropic("req_1e1b503751b2087400d56cf8")


def _by_tag(*kinds: type[Struct]) -> Mapping[str, type[Struct]]:
    """Types of events by the names of their events."""
    return {str(kind.__struct_config__.tag): kind for kind in kinds}


COMPLETION_EVENTS = Events(types={"": Completion}, example=examples.COMPLETION_EVENTS)
CHAT_EVENTS = Events(types={"": ChatCompletionChunk}, example=examples.CHAT_EVENTS)
MESSAGE_EVENTS = Events(
    types=_by_tag(
        message_answers.MessageStart,
        message_answers.BlockStart,
        message_answers.BlockDelta,
        message_answers.BlockStop,
        message_answers.MessageDelta,
        message_answers.MessageStop,
        message_answers.Ping,
    ),
    example=examples.MESSAGE_EVENTS,
    shapes=(ANTHROPIC,),
)
RESPONSE_EVENTS = Events(
    types=_by_tag(
        item_events.Created,
        item_events.Queued,
        item_events.InProgress,
        item_events.ItemAdded,
        item_events.PartAdded,
        item_events.TextDelta,
        item_events.TextDone,
        item_events.ReasoningDelta,
        item_events.ReasoningDone,
        item_events.ArgumentsDelta,
        item_events.ArgumentsDone,
        item_events.PartDone,
        item_events.ItemDone,
        item_events.Completed,
        item_events.Incomplete,
        item_events.Failed,
    ),
    example=examples.RESPONSE_EVENTS,
    shapes=(STREAM_SHAPE,),
)
ALL_EVENTS = Events(
    types={**MESSAGE_EVENTS.types, **RESPONSE_EVENTS.types, "": (Completion, ChatCompletionChunk)},
    example=examples.CHAT_EVENTS,
    shapes=(OPENAI, ANTHROPIC, STREAM_SHAPE),
    example_id=examples.CHAT.id,
)

TAGS = {
    "Generation": "Text from a prompt or a conversation, whole or as a stream of server-sent events.",
    "Responses": "Responses that are kept.",
    "Embeddings": "Vectors of texts.",
    "Streams": "Streams that outlive their connection.",
    "Models": "What is served, and how.",
    "Tokens": "Text to tokens, tokens to text.",
    "Batches": "Files with a request a line, which are answered while nobody else needs the engine.",
    "Engine": "The engine's steps as they are made, for those who watch.",
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
        events=COMPLETION_EVENTS,
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
        events=CHAT_EVENTS,
        is_empty=True,
        errors=GENERATION_ERRORS,
    ),
    "POST /v1/messages": Operation(
        tag="Generation",
        summary="Answer a conversation, as Anthropic's API does",
        body=MessagesBody,
        bodies=examples.MESSAGE_BODIES,
        headers=GENERATION_HEADERS,
        answer=MessageAnswer,
        example=examples.MESSAGE,
        events=MESSAGE_EVENTS,
        is_empty=True,
        errors=GENERATION_ERRORS,
        shape=ANTHROPIC,
    ),
    "POST /v1/messages/count_tokens": Operation(
        tag="Tokens",
        summary="Count the tokens of the prompt that a message would have",
        body=CountBody,
        bodies=examples.COUNT_BODIES,
        answer=TokenCount,
        example=TokenCount(14),
        errors=(*BODY_ERRORS, ModelNotFoundError),
        shape=ANTHROPIC,
    ),
    "POST /v1/responses": Operation(
        tag="Generation",
        summary="Answer a conversation in items",
        description="With `background` the answer comes at once, and the response is made meanwhile.",
        body=ResponsesBody,
        bodies=examples.RESPONSE_BODIES,
        headers=GENERATION_HEADERS,
        answer=ResponseObject,
        example=examples.RESPONSE,
        events=RESPONSE_EVENTS,
        is_empty=True,
        errors=(*GENERATION_ERRORS, NotFoundError),
    ),
    "POST /v1/responses/input_tokens": Operation(
        tag="Tokens",
        summary="Count the tokens of the prompt that a response would have",
        body=ResponsesBody,
        bodies=examples.INPUT_BODIES,
        answer=InputTokens,
        example=InputTokens(14),
        errors=(*BODY_ERRORS, ContextLengthError, NotFoundError, ModelNotFoundError),
    ),
    "GET /v1/responses/{response_id}": Operation(
        tag="Responses",
        summary="Get a response as it is so far",
        description="With `stream` the answer is the events of a response in the background from number "
        "`starting_after` + 1 on, as they come.",
        query=ResponseQuery,
        headers=("x-seed",),
        answer=ResponseObject,
        example=examples.RESPONSE,
        events=RESPONSE_EVENTS,
        errors=(InvalidRequestError, NotFoundError, StreamExpiredError),
    ),
    "DELETE /v1/responses/{response_id}": Operation(
        tag="Responses",
        summary="Forget a response",
        answer=DeletedResponse,
        example=DeletedResponse(examples.RESPONSE.id),
        errors=(NotFoundError,),
    ),
    "GET /v1/responses/{response_id}/input_items": Operation(
        tag="Responses",
        summary="List the conversation that was answered, the newest item first",
        query=ItemsQuery,
        answer=ItemPage,
        example=examples.ITEMS,
        errors=(InvalidRequestError, NotFoundError),
    ),
    "POST /v1/responses/{response_id}/cancel": Operation(
        tag="Responses",
        summary="End a response that is made in the background",
        answer=ResponseObject,
        example=examples.RESPONSE,
        errors=(InvalidRequestError, NotFoundError),
    ),
    "POST /v1/embeddings": Operation(
        tag="Embeddings",
        summary="Make vectors of texts",
        body=EmbeddingsBody,
        bodies=examples.EMBEDDING_BODIES,
        headers=_TERMS_HEADERS,
        answer=Embeddings,
        example=examples.EMBEDDINGS,
        errors=_WORK_ERRORS,
    ),
    "GET /v1/streams/{stream_id}": Operation(
        tag="Streams",
        summary="Go on with an answer",
        description="Gives what follows the event that `Last-Event-ID` names, and then what comes.  It takes over: a "
        "connection on which the stream is still sent ends.  After the last event the answer is 204.",
        headers=("Last-Event-ID", "x-seed", "x-stream-resume"),
        answer=(Completion, ChatCompletion, MessageAnswer, ResponseObject),
        example=examples.CHAT,
        events=ALL_EVENTS,
        is_empty=True,
        errors=(*_WORK_ERRORS, NotFoundError, StreamExpiredError),
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
        errors=(ModelNotFoundError, NotFoundError),  # no path holds a name with a line break
    ),
    "GET /server_info": Operation(
        tag="Models",
        summary="Get the limits and settings of the server",
        answer=ServerInfo,
        example=examples.SERVER_INFO,
    ),
    "GET /tokenizer_info": Operation(
        tag="Tokens",
        summary="Get the chat template and the special tokens",
        answer=TokenizerInfo,
        example=examples.TOKENIZER_INFO,
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
    "GET /v1/engine/events": Operation(
        tag="Engine",
        summary="Watch the engine",
        description="A stream without an end: a snapshot, what is kept of the last minutes, and then each step, or "
        "several together where an eye could not follow.  The engine tells nothing while nobody watches.  An "
        "event's id as `Last-Event-ID` goes on behind it.",
        query=EngineQuery,
        headers=("Last-Event-ID",),
        events=Events(
            types={"snapshot": Snapshot, "lost": Lost, "step": SeenStep},
            example=examples.ENGINE_EVENTS,
            shapes=(EVENTS_SHAPE,),
            example_id=examples.LOG_NAME,
        ),
    ),
    "POST /v1/engine/steps": Operation(
        tag="Engine",
        summary="Have the next steps told of one by one",
        description=_NO_CONTENT,
        body=StepsBody,
        bodies={"some": {"num_steps": 100}},
        errors=BODY_ERRORS,
    ),
    "GET /v1/engine/requests/{request_id}": Operation(
        tag="Engine",
        summary="Get the tokens of an unfinished request",
        description="Only of those that came with the same API key.",
        answer=RequestTokens,
        example=examples.REQUEST_TOKENS,
        errors=(NotFoundError,),
    ),
    "GET /v1/engine/loads": Operation(
        tag="Engine", summary="List the loads, the newest first", answer=Loads, example=examples.LOADS
    ),
    "POST /v1/engine/loads": Operation(
        tag="Engine",
        summary="Start a small load",
        description="One at a time.  Another policy is used while it runs, if no other request is unfinished.",
        body=LoadBody,
        bodies={"chat": {"workload": "chat", "users": 4, "seconds": 1}},
        answer=Load,
        example=examples.LOAD,
        errors=BODY_ERRORS,
    ),
    "DELETE /v1/engine/loads/{load_id}": Operation(
        tag="Engine", summary="End a load", answer=Load, example=examples.LOAD, errors=(NotFoundError,)
    ),
    "POST /v1/engine/plan": Operation(
        tag="Engine",
        summary="Say what a model costs on a machine",
        description="As `shoal plan`; one at a time, because this machine is measured.",
        body=PlanBody,
        bodies={"h100": {"machine": "h100", "context": 512, "batch": 16}},
        answer=Planned,
        example=examples.PLANNED,
        errors=BODY_ERRORS,
    ),
    "POST /reset_prefix_cache": Operation(
        tag="Operations", summary="Have later requests find no prefix of earlier ones", description=_NO_CONTENT
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
    "GET /": Operation(
        tag="Operations",
        summary="Talk with the model, and watch the engine",
        description="A page; its files are at `/page/{file_name}`.",
        texts={"text/html": "<!doctype html>..."},
    ),
    "GET /page/{file_name}": Operation(
        tag="Operations",
        summary="Get a file of the page",
        texts={"text/javascript": "export ...", "text/css": "...", "text/html": "<!doctype html>..."},
        errors=(NotFoundError,),
    ),
    "GET /docs": Operation(
        tag="Operations",
        summary="Read this document as a page",
        texts={"text/html": "<!doctype html>..."},
    ),
}
