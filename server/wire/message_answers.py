"""Answers of Anthropic's Messages API, whole and as events, exactly as it defines them, but for what is `Told`."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct, field

from shoal.server.wire.responses import Told

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class Usage(Struct):
    """Tokens; those of the prompt that the prefix cache had are not among `input_tokens`."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


class Tagged(Struct, tag_field="type"):
    """What says by its `type` what it is."""

    @property
    def type(self) -> str:
        return str(self.__struct_config__.tag)


class TextBlock(Tagged, tag="text"):
    text: str = ""


class ThinkingBlock(Tagged, tag="thinking"):
    """A thought; the signature is a digest of it, which nobody asks for."""

    thinking: str = ""
    signature: str = ""


class ToolUseBlock(Tagged, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any] = field(default_factory=dict)


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class MessageAnswer(Tagged, Told, tag="message"):
    """The whole answer; where it opens a stream it has no content yet."""

    id: str
    model: str
    content: list[ContentBlock]
    usage: Usage
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    role: str = "assistant"


class TokenCount(Struct):
    input_tokens: int


# -- events ------------------------------------------------------------------------------------------------------------


class MessageStart(Tagged, tag="message_start"):
    message: MessageAnswer


class BlockStart(Tagged, tag="content_block_start"):
    index: int
    content_block: ContentBlock


class TextDelta(Tagged, tag="text_delta"):
    text: str


class ThinkingDelta(Tagged, tag="thinking_delta"):
    thinking: str


class SignatureDelta(Tagged, tag="signature_delta"):
    signature: str


class InputDelta(Tagged, tag="input_json_delta"):
    partial_json: str


class BlockDelta(Tagged, tag="content_block_delta"):
    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class BlockStop(Tagged, tag="content_block_stop"):
    index: int


class Stop(Struct):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Tagged, Told, tag="message_delta"):
    delta: Stop
    usage: Usage


class MessageStop(Tagged, tag="message_stop"):
    pass


class Ping(Tagged, tag="ping"):
    pass
