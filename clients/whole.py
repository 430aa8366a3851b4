"""Whole answers, put together of what was streamed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shoal.clients.errors import ProtocolError
from shoal.clients.formats import ResponseFormat
from shoal.clients.types import Choice, ChoiceDelta, Chunk, Completion, TokenLogprob, ToolCall, ToolCallDelta, Usage


class GrowingAnswer:
    """A streamed answer as far as it has come."""

    def __init__(self, response_format: ResponseFormat | None) -> None:
        self._response_format = response_format
        self._first: Chunk | None = None
        self._last: Chunk | None = None
        self._seed: int | None = None
        self._usage: Usage | None = None
        self._choices: dict[int, _GrowingChoice] = {}

    def add(self, chunk: Chunk) -> None:
        self._first = self._first or chunk
        self._last = chunk
        self._seed = chunk.seed if self._seed is None else self._seed
        self._usage = chunk.usage or self._usage
        for delta in chunk.choices:
            self._choices.setdefault(delta.index, _GrowingChoice()).add(delta)

    def completion(self) -> Completion[Any]:
        """What the server would have answered without a stream; if it counted no tokens, `usage` has zeros.

        Raises:
            ProtocolError: the answer has not ended.
        """
        if self._first is None or self._last is None:
            raise ProtocolError("the stream ended without an answer")
        choices = tuple(self._choices[index].choice(index, self._response_format) for index in sorted(self._choices))
        origin, last = self._first, self._last
        usage = self._usage or Usage(0, 0)
        return Completion(
            origin.id, origin.created, origin.model, choices, usage, self._seed, last.timing, last.receipt
        )


@dataclass
class _GrowingCall:
    """The id and the name come once, whichever delta has them."""

    id: str = ""
    name: str = ""
    arguments_json: list[str] = field(default_factory=list)

    def add(self, delta: ToolCallDelta) -> None:
        self.id = self.id or delta.id or ""
        self.name = self.name or delta.name or ""
        self.arguments_json.append(delta.arguments_json)


@dataclass
class _GrowingChoice:
    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, _GrowingCall] = field(default_factory=dict)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None

    def add(self, delta: ChoiceDelta) -> None:
        self.texts.append(delta.text)
        self.reasoning.append(delta.reasoning)
        self.finish_reason = delta.finish_reason or self.finish_reason
        if delta.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs.extend(delta.logprobs)
        for call in delta.tool_calls:
            self.calls.setdefault(call.index, _GrowingCall()).add(call)

    def choice(self, index: int, response_format: ResponseFormat | None) -> Choice[Any]:
        if self.finish_reason is None:
            raise ProtocolError("the stream ended without a finish_reason")
        calls = [self.calls[number] for number in sorted(self.calls)]
        return Choice(
            index=index,
            text="".join(self.texts),
            finish_reason=self.finish_reason,
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
            tool_calls=tuple(ToolCall(call.id, call.name, "".join(call.arguments_json)) for call in calls),
            reasoning="".join(self.reasoning),
            response_format=response_format,
        )
