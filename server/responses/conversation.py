"""From a request of the Responses API to the chat that answers it, and back to the words in which it was asked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.responses.store import ResponseStore
from shoal.server.wire.items import (
    EXTENSIONS,
    CallItem,
    ChosenTool,
    FunctionTool,
    InputItem,
    Item,
    MessageItem,
    ReasoningItem,
    ResponsesBody,
    ResultItem,
)
from shoal.server.wire.parsing import read_body
from shoal.server.wire.requests import ChatBody

# What chats call it, and what it is called here, in the messages of errors.
_RENAMED = (
    (re.compile(r"^messages\b"), "input"),
    (re.compile(r"^response_format(\.json_schema)?"), "text.format"),
    (re.compile(r"^reasoning_effort\b"), "reasoning.effort"),
    (re.compile(r"^(tools\[\d+\])\.function\b"), r"\1"),
    (re.compile(r"\bmax_(completion_)?tokens\b"), "max_output_tokens"),
)
_PARAMS = {
    "messages": "input",
    "prompt": "input",
    "response_format": "text",
    "reasoning_effort": "reasoning",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
}


def items_of(body: ResponsesBody, store: ResponseStore, owner: str | None) -> list[Item]:
    """The items of the conversation so far: those of the response before, with its output, and those of the request.

    Raises:
        InvalidRequestError: an item lacks something, is a result of no call, or is not held.
    """
    items = store.conversation(body.previous_response_id, owner) if body.previous_response_id is not None else []
    called = {item.call_id for item in items if isinstance(item, CallItem)}
    given = [InputItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    for number, one in enumerate(given):
        path = f"input[{number}]"
        item = store.item(one.id, owner, path) if one.type == "item_reference" and one.id else one.item(path)
        if isinstance(item, CallItem):
            called.add(item.call_id)
        if isinstance(item, ResultItem) and item.call_id not in called:
            raise InvalidRequestError(f"{path}.call_id: no function_call before it has this id", param="input")
        items.append(item)
    return items


def chat_of(body: ResponsesBody, items: Sequence[Item]) -> ChatBody:
    """The chat that answers a request.

    Raises:
        InvalidRequestError: chats do not take it.
    """
    messages = messages_of(body.instructions, items)
    if not messages:
        raise InvalidRequestError("input: has no message", param="input")
    values = {
        "model": body.model,
        "messages": messages,
        "stream": body.stream,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "tools": [_tool(tool) for tool in body.tools] if body.tools else None,
        "tool_choice": _choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _response_format(body),
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "logprobs": body.wants_logprobs,
        "top_logprobs": body.top_logprobs if body.wants_logprobs else None,
        "user": body.user,
    }
    values |= {name: getattr(body, name) for name in EXTENSIONS}
    return read_body(ChatBody, {name: value for name, value in values.items() if value is not None})


def messages_of(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The messages of a chat.

    What the assistant thinks, says and calls without a word of others is one message, as it was when a chat said it.
    System messages at the beginning are one, for many templates know no second one.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    said: dict[str, Any] = {}  # the message of the assistant that goes on, as long as nobody else says something
    for item in items:
        if isinstance(item, ResultItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
            said = {}
            continue
        if isinstance(item, MessageItem) and item.role != "assistant":
            _add_message(messages, item)
            said = {}
            continue
        if not said or not _goes_on(said, item):
            said = {"role": "assistant"}
            messages.append(said)
        match item:
            case ReasoningItem():
                said["reasoning_content"] = said.get("reasoning_content", "") + item.text
            case MessageItem():
                said["content"] = said.get("content", "") + item.text
            case CallItem():
                function = {"name": item.name, "arguments": item.arguments}
                said.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
    return messages


def _add_message(messages: list[dict[str, Any]], item: MessageItem) -> None:
    role = "system" if item.role == "developer" else item.role
    if role == "system" and len(messages) == 1 and messages[0]["role"] == "system":
        messages[0]["content"] += f"\n\n{item.text}"
    else:
        messages.append({"role": role, "content": item.text})


def _goes_on(said: dict[str, Any], item: Item) -> bool:
    """Whether an item belongs to this message of the assistant."""
    match item:
        case ReasoningItem():
            return "content" not in said and "tool_calls" not in said
        case MessageItem():
            return "content" not in said or "tool_calls" in said
    return True


def _tool(tool: FunctionTool) -> dict[str, Any]:
    named = {"name": tool.name, "description": tool.description, "parameters": tool.parameters, "strict": tool.strict}
    return {"type": "function", "function": {name: value for name, value in named.items() if value is not None}}


def _choice(choice: str | ChosenTool | None) -> Any:
    if not isinstance(choice, ChosenTool):
        return choice
    if choice.type == "function":
        return {"type": "function", "function": {"name": choice.name}}
    tools = [{"type": "function", "function": {"name": tool.name}} for tool in choice.tools or ()]
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": tools}}


def _response_format(body: ResponsesBody) -> dict[str, Any] | None:
    asked = body.text and body.text.format
    if not asked or asked.type == "text":
        return None
    if asked.type == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": asked.name, "schema": asked.schema}}


# -- errors --------------------------------------------------------------------------------------------------------


@contextmanager
def own_words() -> Iterator[None]:
    """What chats refuse is said with the names of this API."""
    try:
        yield
    except InvalidRequestError as error:
        raise in_own_words(error) from error


def in_own_words(error: InvalidRequestError) -> InvalidRequestError:
    """The same error with the names that fields have in this API."""
    message = error.message
    for pattern, name in _RENAMED:
        message = pattern.sub(name, message)
    return type(error)(message, param=_PARAMS.get(error.param or "", error.param), retry_after=error.retry_after)
