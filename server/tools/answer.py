"""What the API says of one choice of a chat: content, reasoning and calls, streamed or whole."""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.server.tools.reader import AnswerReader, CallPiece, Said
from shoal.server.wire.responses import (
    ChatDelta,
    ChatMessage,
    FinishReasonName,
    FunctionCall,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)


class ChatAnswer:
    """Shapes the text of one choice.

    Args:
        reader: of the text; None if all of it is content.

    Attributes:
        opening: the first delta of a stream.
        nothing: a delta that comes with log-probabilities alone.
    """

    def __init__(self, reader: AnswerReader | None) -> None:
        self._reader = reader
        self._has_content = False
        # A content that is empty differs from none, as beside calls, so that it waits for what is said.
        content = "" if reader is None else None
        self.opening = ChatDelta(role="assistant", content=content)
        self.nothing = ChatDelta(content=content)

    def deltas(self, text: str, *, is_last: bool) -> list[ChatDelta]:
        """What a piece of the text adds to the message, as OpenAI streams it: a delta for each piece of a call."""
        if self._reader is None:
            return [ChatDelta(content=text)] if text else []
        deltas = self._shaped(self._reader.feed(text))
        if is_last:
            deltas += self._shaped(self._reader.finish())
            if not self._has_content and not self._reader.num_calls:
                deltas.append(ChatDelta(content=""))
        return deltas

    def message(self, text: str) -> ChatMessage:
        """The whole message: what the deltas of a stream are together."""
        if self._reader is None:
            return ChatMessage(text)
        deltas, calls = self.deltas(text, is_last=True), list[ToolCall]()
        for piece in (piece for delta in deltas for piece in delta.tool_calls or []):
            function = piece.function or FunctionDelta()
            if piece.id is not None:
                calls.append(ToolCall(piece.id, FunctionCall(function.name or "", "")))
            calls[piece.index].function.arguments += function.arguments or ""
        contents = [delta.content for delta in deltas if delta.content is not None]
        thoughts = [delta.reasoning_content for delta in deltas if delta.reasoning_content is not None]
        return ChatMessage(
            "".join(contents) if contents else None,
            tool_calls=calls or msgspec.UNSET,
            reasoning_content="".join(thoughts) if thoughts else msgspec.UNSET,
        )

    def finish_reason(self, reason: Literal["stop", "length"] | None) -> FinishReasonName | None:
        """Why the text ends; an answer that ends by itself and has calls ends for these."""
        has_calls = self._reader is not None and self._reader.num_calls > 0
        return "tool_calls" if has_calls and reason == "stop" else reason

    def _shaped(self, said: Said) -> list[ChatDelta]:
        self._has_content = self._has_content or bool(said.content)
        deltas = [ChatDelta(reasoning_content=said.reasoning)] if said.reasoning else []
        deltas += [ChatDelta(content=said.content)] if said.content else []
        return deltas + [ChatDelta(tool_calls=[_call_delta(piece)]) for piece in said.calls]


def _call_delta(piece: CallPiece) -> ToolCallDelta:
    if piece.id is None:
        return ToolCallDelta(piece.index, function=FunctionDelta(arguments=piece.arguments))
    return ToolCallDelta(piece.index, piece.id, "function", FunctionDelta(piece.name, piece.arguments))
