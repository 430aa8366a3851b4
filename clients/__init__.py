"""A typed client of Shoal's HTTP API, which needs nothing of the server.

Start with `ShoalClient` or `AsyncShoalClient`.  Both are loaded when they are first asked for, so that the command line
can answer `--help` without waiting for httpx.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from shoal.clients.batches import (
    Batch,
    BatchError,
    BatchLine,
    BatchResult,
    File,
    FileListOptions,
    ListOptions,
    OrderedListOptions,
    Page,
    RequestCounts,
)
from shoal.clients.conversations import (
    Block,
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
from shoal.clients.errors import (
    ApiError,
    BrokenConnectionError,
    ClientError,
    ParseError,
    ProtocolError,
    StatusError,
    StreamError,
    TimedOutError,
    TransportError,
    UnreachableError,
    UnsendableError,
)
from shoal.clients.formats import JsonModel, ResponseFormat
from shoal.clients.tools import Tool, ToolChoice
from shoal.clients.types import (
    Capabilities,
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
    PromptLogprob,
    Receipt,
    SamplingOptions,
    ServerInfo,
    StructuredOutputs,
    Timing,
    Tokenization,
    TokenizationOptions,
    TokenizerInfo,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)

if TYPE_CHECKING:
    from shoal.clients.async_client import AsyncShoalClient, AsyncStream
    from shoal.clients.client import ShoalClient, Stream

__all__ = [
    "ApiError",
    "AsyncShoalClient",
    "AsyncStream",
    "Batch",
    "BatchError",
    "BatchLine",
    "BatchResult",
    "Block",
    "BrokenConnectionError",
    "Capabilities",
    "ChatOptions",
    "Choice",
    "ChoiceDelta",
    "Chunk",
    "ClientError",
    "Completion",
    "CompletionOptions",
    "EmbeddingOptions",
    "Embeddings",
    "File",
    "FileListOptions",
    "Item",
    "JsonModel",
    "ListOptions",
    "Message",
    "MessageAnswer",
    "MessageEvent",
    "MessageOptions",
    "MessagePrompt",
    "Model",
    "OrderedListOptions",
    "Page",
    "ParseError",
    "Prompt",
    "PromptLogprob",
    "ProtocolError",
    "Receipt",
    "RequestCounts",
    "Response",
    "ResponseEvent",
    "ResponseFormat",
    "ResponseInput",
    "ResponseOptions",
    "SamplingOptions",
    "ServerInfo",
    "ShoalClient",
    "StatusError",
    "Stream",
    "StreamError",
    "StructuredOutputs",
    "TimedOutError",
    "Timing",
    "TokenLogprob",
    "Tokenization",
    "TokenizationOptions",
    "TokenizerInfo",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolChoice",
    "TransportError",
    "UnreachableError",
    "UnsendableError",
    "Usage",
]

_LOADED_LATE = {
    "AsyncShoalClient": "shoal.clients.async_client",
    "AsyncStream": "shoal.clients.async_client",
    "ShoalClient": "shoal.clients.client",
    "Stream": "shoal.clients.client",
}


def __getattr__(name: str) -> object:
    if name not in _LOADED_LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LOADED_LATE[name]), name)
