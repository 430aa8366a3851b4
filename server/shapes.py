"""How errors look in Anthropic's API, and which API a path belongs to."""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import partial
from typing import Any

import msgspec

from shoal.scheduler.errors import ShoalError
from shoal.server.errors import OPENAI, ErrorShape, error_body, http_error
from shoal.server.service import new_id

MESSAGES_PATH = "/v1/messages"
# By HTTP status; all others are `invalid_request_error`.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
# What chats, which messages become, call otherwise.  No name here is longer than there.
_NAMES = {
    "response_format.json_schema": "output_config.format",
    "function.parameters": "input_schema",
    "'required'": "'any'",
}


class AnthropicError(msgspec.Struct):
    type: str
    message: str


class AnthropicErrorBody(msgspec.Struct, tag_field="type", tag="error"):
    error: AnthropicError
    request_id: str


def shape_of(scope: MutableMapping[str, Any]) -> ErrorShape:
    """How errors look on the path of a request (an ASGI scope), whatever raises them."""
    if not scope["path"].startswith(MESSAGES_PATH):
        return OPENAI
    request_id = scope.setdefault("state", {}).setdefault("request_id", new_id("req_"))
    return anthropic(request_id)


def anthropic(request_id: str) -> ErrorShape:
    """How errors of a request of this id look, and what its answers and streams have besides."""
    ping = b'event: ping\ndata: {"type":"ping"}\n\n'
    headers = {"request-id": request_id, "x-request-id": request_id}
    return ErrorShape(partial(_body, request_id), event="error", done=b"", keep_alive=ping, headers=headers)


def _body(request_id: str, error: ShoalError) -> AnthropicErrorBody:
    message = error_body(error).error.message
    for chats_name, name in _NAMES.items():
        message = message.replace(chats_name, name)
    kind = _TYPES.get(http_error(error).status, "invalid_request_error")
    return AnthropicErrorBody(AnthropicError(kind, message), request_id)
