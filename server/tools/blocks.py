"""What Anthropic's API says of an answer: blocks of content, streamed or whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any

from pydantic_core import from_json

from shoal.server.tools.answer import ChatAnswer
from shoal.server.wire.message_answers import (
    BlockDelta,
    BlockStart,
    BlockStop,
    ContentBlock,
    InputDelta,
    SignatureDelta,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)
from shoal.server.wire.responses import ToolCallDelta

BlockEvent = BlockStart | BlockDelta | BlockStop
INVALID = "INVALID_JSON"  # the name that Anthropic's documentation gives to an input that is none


class AnswerBlocks:
    """Shapes the text of one answer: a block follows the other, and none has a part of the next."""

    def __init__(self, answer: ChatAnswer) -> None:
        self._answer = answer
        self._index = -1
        self._open: ContentBlock | None = None
        self._digest = blake2b(digest_size=16)  # of the thought that is open

    def events(self, text: str, *, is_last: bool) -> list[BlockEvent]:
        """What a piece of the text adds."""
        events: list[BlockEvent] = []
        for delta in self._answer.deltas(text, is_last=is_last):
            if thought := delta.reasoning_content:
                if not isinstance(self._open, ThinkingBlock):
                    self._digest = blake2b(digest_size=16)
                    events += self._begin(ThinkingBlock())
                self._digest.update(thought.encode())
                events.append(BlockDelta(self._index, ThinkingDelta(thought)))
            if content := delta.content:
                if not isinstance(self._open, TextBlock):
                    events += self._begin(TextBlock())
                events.append(BlockDelta(self._index, TextDelta(content)))
            for piece in delta.tool_calls or []:
                events += self._of_call(piece)
        if is_last:
            events += self._end()
        return events

    def _of_call(self, piece: ToolCallDelta) -> Iterator[BlockEvent]:
        assert piece.function is not None
        if piece.id is not None:
            name = piece.function.name or ""
            yield from self._begin(ToolUseBlock(piece.id.replace("call_", "toolu_", 1), name))
        if piece.function.arguments:
            yield BlockDelta(self._index, InputDelta(piece.function.arguments))

    def _begin(self, block: ContentBlock) -> Iterator[BlockEvent]:
        yield from self._end()
        self._index += 1
        self._open = block
        yield BlockStart(self._index, block)

    def _end(self) -> Iterator[BlockEvent]:
        if isinstance(self._open, ThinkingBlock):
            yield BlockDelta(self._index, SignatureDelta(self._digest.hexdigest()))
        if self._open is not None:
            yield BlockStop(self._index)
        self._open = None


def content(events: Iterable[BlockEvent]) -> list[ContentBlock]:
    """The blocks of a whole answer: what its events are together."""
    blocks, inputs = list[ContentBlock](), dict[int, str]()
    for event in events:
        match event:
            case BlockStart(content_block=block):
                blocks.append(block)
            case BlockDelta(index, delta):
                match blocks[index], delta:
                    case TextBlock() as block, TextDelta(text):
                        block.text += text
                    case ThinkingBlock() as block, ThinkingDelta(thought):
                        block.thinking += thought
                    case ThinkingBlock() as block, SignatureDelta(signature):
                        block.signature = signature
                    case ToolUseBlock(), InputDelta(piece):
                        inputs[index] = inputs.get(index, "") + piece
    for index, text in inputs.items():
        block = blocks[index]
        assert isinstance(block, ToolUseBlock)
        block.input = read_input(text)
    return blocks


def read_input(text: str) -> dict[str, Any]:
    """The input of a call as Anthropic's clients put it together; of one that was cut off what is whole."""
    try:
        found = from_json(text, allow_partial=True)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {INVALID: text}
