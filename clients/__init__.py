"""A typed client of Shoal's HTTP API, which needs nothing of the server.

Start with `ShoalClient` or `AsyncShoalClient`.  Both are loaded when they are first asked for, so that the command line
can answer `--help` without waiting for httpx.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

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
    Receipt,
    SamplingOptions,
    StructuredOutputs,
    Timing,
    Tokenization,
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
    "BrokenConnectionError",
    "ChatOptions",
    "Choice",
    "ChoiceDelta",
    "Chunk",
    "ClientError",
    "Completion",
    "CompletionOptions",
    "EmbeddingOptions",
    "Embeddings",
    "JsonModel",
    "Message",
    "Model",
    "ParseError",
    "Prompt",
    "ProtocolError",
    "Receipt",
    "ResponseFormat",
    "SamplingOptions",
    "ShoalClient",
    "StatusError",
    "Stream",
    "StreamError",
    "StructuredOutputs",
    "TimedOutError",
    "Timing",
    "TokenLogprob",
    "Tokenization",
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
