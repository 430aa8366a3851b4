"""The events of a stream of OpenAI's Responses API.  The number of an event is set where it is sent."""

from __future__ import annotations

from msgspec import Struct

from shoal.server.errors import ErrorObject
from shoal.server.wire.items import (
    CallItem,
    Logprobs,
    MessageItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseObject,
)


class ItemEvent(Struct, kw_only=True, tag_field="type"):
    sequence_number: int = 0

    @property
    def kind(self) -> str:
        """Its type, which is its name too."""
        return str(self.__struct_config__.tag)


class _OfResponse(ItemEvent, kw_only=True):
    response: ResponseObject


class Created(_OfResponse, kw_only=True, tag="response.created"):
    pass


class Queued(_OfResponse, kw_only=True, tag="response.queued"):
    pass


class InProgress(_OfResponse, kw_only=True, tag="response.in_progress"):
    pass


class Completed(_OfResponse, kw_only=True, tag="response.completed"):
    pass


class Incomplete(_OfResponse, kw_only=True, tag="response.incomplete"):
    pass


class Failed(_OfResponse, kw_only=True, tag="response.failed"):
    pass


class ItemAdded(ItemEvent, kw_only=True, tag="response.output_item.added"):
    output_index: int
    item: MessageItem | ReasoningItem | CallItem


class ItemDone(ItemEvent, kw_only=True, tag="response.output_item.done"):
    output_index: int
    item: MessageItem | ReasoningItem | CallItem


class _OfItem(ItemEvent, kw_only=True):
    item_id: str
    output_index: int


class _OfPart(_OfItem, kw_only=True):
    content_index: int = 0


class PartAdded(_OfPart, kw_only=True, tag="response.content_part.added"):
    part: OutputText | ReasoningText


class PartDone(_OfPart, kw_only=True, tag="response.content_part.done"):
    part: OutputText | ReasoningText


class TextDelta(_OfPart, kw_only=True, tag="response.output_text.delta"):
    delta: str
    logprobs: Logprobs


class TextDone(_OfPart, kw_only=True, tag="response.output_text.done"):
    text: str
    logprobs: Logprobs


class ReasoningDelta(_OfPart, kw_only=True, tag="response.reasoning_text.delta"):
    delta: str


class ReasoningDone(_OfPart, kw_only=True, tag="response.reasoning_text.done"):
    text: str


class ArgumentsDelta(_OfItem, kw_only=True, tag="response.function_call_arguments.delta"):
    delta: str


class ArgumentsDone(_OfItem, kw_only=True, tag="response.function_call_arguments.done"):
    name: str
    arguments: str


class ErrorEvent(ItemEvent, kw_only=True, tag="error"):
    """An error as it is documented, and in the object by which OpenAI's clients know one."""

    code: str | None
    message: str
    param: str | None
    error: ErrorObject
