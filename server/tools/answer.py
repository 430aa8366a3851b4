"""What the API says of one choice of a chat: content, reasoning and calls, streamed or whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from shoal.server.tools.reader import AnswerReader, CallPiece, Said
from shoal.server.tools.thoughts import ThoughtCounter
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
        counter: of the tokens of its thought; None if there are none.
        shows_reasoning: whether thoughts are told.
        said: what the content begins with.
        calls_functions: whether a call is told as it was before there were tools.

    Attributes:
        opening: the first delta of a stream.
        nothing: a delta that comes with log-probabilities alone.
    """

    def __init__(
        self,
        reader: AnswerReader | None,
        counter: ThoughtCounter | None = None,
        *,
        shows_reasoning: bool = True,
        said: str = "",
        calls_functions: bool = False,
    ) -> None:
        self._reader = reader
        self._said = said
        self._calls_functions = calls_functions
        self._counter = counter
        self._shows_reasoning = shows_reasoning
        self._has_content = False
        # A content that is empty differs from none, as beside calls, so that it waits for what is said.
        content = "" if reader is None else None
        self.opening = ChatDelta(role="assistant", content=said or content)
        self.nothing = ChatDelta(content=content)

    @property
    def num_reasoning_tokens(self) -> int:
        return 0 if self._counter is None else self._counter.count

    def deltas(self, text: str, token_ids: Sequence[int] = (), *, is_last: bool) -> list[ChatDelta]:
        """What a piece of the text adds to the message, as OpenAI streams it: a delta for each piece of a call."""
        if self._counter is not None:
            self._counter.push(token_ids)
        if self._reader is None:
            return [ChatDelta(content=text)] if text else []
        deltas = self._shaped(self._reader.feed(text))
        if is_last:
            deltas += self._shaped(self._reader.finish())
            if not self._has_content and not self._reader.num_calls:
                deltas.append(ChatDelta(content=""))
        return deltas

    def message(self, text: str, token_ids: Sequence[int] = ()) -> ChatMessage:
        """The whole message: what the deltas of a stream are together."""
        if self._reader is None:
            return ChatMessage(self._said + text)
        deltas, calls = self.deltas(text, token_ids, is_last=True), list[ToolCall]()
        for piece in (piece for delta in deltas for piece in delta.tool_calls or []):
            function = piece.function or FunctionDelta()
            if piece.id is not None:
                calls.append(ToolCall(piece.id, FunctionCall(function.name or "", "")))
            calls[piece.index].function.arguments += function.arguments or ""
        functions = [delta.function_call for delta in deltas if delta.function_call]
        arguments = "".join(one.arguments or "" for one in functions)
        contents = [delta.content for delta in deltas if delta.content is not None]
        thoughts = [delta.reasoning_content for delta in deltas if delta.reasoning_content is not None]
        return ChatMessage(
            self._said + "".join(contents) if contents or self._said else None,
            tool_calls=calls or msgspec.UNSET,
            function_call=FunctionCall(functions[0].name or "", arguments) if functions else msgspec.UNSET,
            reasoning_content="".join(thoughts) if thoughts else msgspec.UNSET,
        )

    def finish_reason(self, reason: Literal["stop", "length"] | None) -> FinishReasonName | None:
        """Why the text ends; an answer that ends by itself and has calls ends for these."""
        has_calls = self._reader is not None and self._reader.num_calls > 0
        called: FinishReasonName = "function_call" if self._calls_functions else "tool_calls"
        return called if has_calls and reason == "stop" else reason

    def _shaped(self, said: Said) -> list[ChatDelta]:
        self._has_content = self._has_content or bool(said.content)
        is_thought = said.reasoning and self._shows_reasoning
        deltas = [ChatDelta(reasoning_content=said.reasoning)] if is_thought else []
        at = 0
        for piece in said.calls:
            if piece.after > at:
                deltas.append(ChatDelta(content=said.content[at : piece.after]))
                at = piece.after
            call = _call_delta(piece)
            as_function = self._calls_functions
            deltas.append(ChatDelta(function_call=call.function) if as_function else ChatDelta(tool_calls=[call]))
        if at < len(said.content):
            deltas.append(ChatDelta(content=said.content[at:]))
        return deltas


def _call_delta(piece: CallPiece) -> ToolCallDelta:
    if piece.id is None:
        return ToolCallDelta(piece.index, function=FunctionDelta(arguments=piece.arguments))
    return ToolCallDelta(piece.index, piece.id, "function", FunctionDelta(piece.name, piece.arguments))
