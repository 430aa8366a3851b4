"""What OpenAI's Responses API and Anthropic's Messages API take and give, beside the types of chats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Required, TypedDict

from shoal.clients.formats import ResponseFormat, read_text
from shoal.clients.tools import Tool, ToolChoice
from shoal.clients.types import Answer, Explained, Message, TemplateOptions, TokenOptions, ToolCall, Usage

# -- OpenAI's Responses --------------------------------------------------------------------------------------------


class Item(TypedDict, total=False):
    """A part of a conversation; its `type` is "message", "reasoning", "function_call" or "function_call_output".

    `Response.output` has those of the model, and `ToolCall.result_item` makes those of tools.
    """

    type: str
    id: str
    status: str
    role: str
    content: str | list[dict[str, Any]]
    summary: list[dict[str, Any]]
    call_id: str
    name: str
    arguments: str
    output: str | list[dict[str, Any]]


ResponseInput = str | Sequence[Mapping[str, Any]]
"""What the user says, or items of a conversation."""


class ResponseOptions(TokenOptions, TemplateOptions, total=False):
    """Optional fields of a response.

    `previous_response_id` has the conversation of that response go on, which the server keeps unless `store` was false.
    With `background` the answer comes at once, and the response is made meanwhile.
    """

    instructions: str
    previous_response_id: str
    max_output_tokens: int

    tools: Sequence[Tool]
    tool_choice: ToolChoice
    parallel_tool_calls: bool

    text: dict[str, Any]
    reasoning: dict[str, Any]
    include: list[str]
    top_logprobs: int
    truncation: str

    background: bool
    store: bool
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class Response(Explained):
    """A response, finished or not.

    Attributes:
        created: seconds since the epoch.
        status: "queued", "in_progress", "completed", "incomplete", "failed" or "cancelled".
        output: what the model thought, said and called, in order.
        usage: once it has ended.
        error: the code and message of one that failed.
        seed: what the server sampled with, if it tells.
        response_format: what the request asked for.
    """

    id: str
    created: int
    model: str
    status: str
    output: tuple[Item, ...]
    usage: Usage | None = None
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, Any] | None = None
    previous_response_id: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    response_format: ResponseFormat | None = field(default=None, repr=False, compare=False)

    @property
    def text(self) -> str:
        return _texts(self.output, "message")

    @property
    def reasoning(self) -> str:
        return _texts(self.output, "reasoning")

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        calls = (item for item in self.output if item.get("type") == "function_call")
        return tuple(ToolCall(item["call_id"], item["name"], item["arguments"]) for item in calls)

    @property
    def parsed(self) -> Any:
        """As `Choice.parsed`."""
        return read_text(self.text, self.response_format)


@dataclass(frozen=True, slots=True)
class ResponseEvent(Answer):
    """One event of a streamed response.

    Attributes:
        type: such as "response.output_text.delta".
        data: all that the event says.
        sequence_number: counted from 0; `stream_response` goes on after it.
        response: the response so far, in events that have it.
    """

    type: str
    data: dict[str, Any]
    sequence_number: int
    response: Response | None = None

    @property
    def text(self) -> str:
        """The new text."""
        return str(self.data["delta"]) if self.type == "response.output_text.delta" else ""

    @property
    def reasoning(self) -> str:
        """The new part of what the model thinks before it answers."""
        return str(self.data["delta"]) if self.type == "response.reasoning_text.delta" else ""

    @property
    def is_last(self) -> bool:
        return self.type in ("response.completed", "response.incomplete", "response.failed", "response.cancelled")


def _texts(items: Sequence[Item], kind: str) -> str:
    contents = (item.get("content") or () for item in items if item.get("type") == kind)
    parts = (part for content in contents if not isinstance(content, str) for part in content)
    return "".join(part.get("text") or "" for part in parts)


# -- Anthropic's Messages ------------------------------------------------------------------------------------------


class Block(TypedDict, total=False):
    """A part of a message; its `type` is "text", "thinking" or "tool_use"."""

    type: Required[str]
    text: str
    thinking: str
    signature: str
    id: str
    name: str
    input: dict[str, Any]


class MessagePrompt(TypedDict, total=False):
    """The fields of which the prompt of a message is made, beside its turns."""

    model: Required[str]
    system: str | list[dict[str, Any]]
    tools: Sequence[Tool]
    tool_choice: ToolChoice
    thinking: dict[str, Any]
    output_config: dict[str, Any]
    chat_template_kwargs: dict[str, Any]


class MessageOptions(MessagePrompt, total=False):
    """Fields of a message; the second group are extensions of Anthropic's API."""

    max_tokens: Required[int]
    temperature: float
    top_p: float
    top_k: int
    stop_sequences: list[str]
    metadata: dict[str, str]

    seed: int
    min_p: float
    repetition_penalty: float
    priority: int
    timeout: float
    timing: bool
    receipt: bool
    stream_interval: int


@dataclass(frozen=True, slots=True)
class MessageAnswer(Explained):
    """A whole message of the model.

    Attributes:
        blocks: what the model thought, said and called, in order.
        stop_reason: "end_turn", "max_tokens", "stop_sequence", "tool_use" or "model_context_window_exceeded".
        response_format: what the request asked for.
    """

    id: str
    model: str
    blocks: tuple[Block, ...]
    stop_reason: str
    stop_sequence: str | None
    usage: Usage
    response_format: ResponseFormat | None = field(default=None, repr=False, compare=False)

    @property
    def text(self) -> str:
        return "".join(block["text"] for block in self.blocks if block["type"] == "text")

    @property
    def reasoning(self) -> str:
        return "".join(block["thinking"] for block in self.blocks if block["type"] == "thinking")

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        calls = (block for block in self.blocks if block["type"] == "tool_use")
        return tuple(ToolCall(one["id"], one["name"], json.dumps(one["input"], ensure_ascii=False)) for one in calls)

    @property
    def parsed(self) -> Any:
        """As `Choice.parsed`."""
        return read_text(self.text, self.response_format)

    @property
    def message(self) -> Message:
        """The answer as a message of the conversation that goes on."""
        return Message(role="assistant", content=list(self.blocks))


@dataclass(frozen=True, slots=True)
class MessageEvent(Answer):
    """One event of a streamed message.

    Attributes:
        type: such as "content_block_delta".
        data: all that the event says.
    """

    type: str
    data: dict[str, Any]

    @property
    def text(self) -> str:
        """The new text."""
        return self._piece("text")

    @property
    def reasoning(self) -> str:
        """The new part of what the model thinks before it answers."""
        return self._piece("thinking")

    @property
    def is_last(self) -> bool:
        return self.type == "message_stop"

    def _piece(self, name: str) -> str:
        return str(self.data["delta"].get(name) or "") if self.type == "content_block_delta" else ""
