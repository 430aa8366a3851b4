"""Whole answers, put together of what was streamed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from shoal.clients import reading, wire
from shoal.clients.conversations import MessageAnswer, MessageEvent, Response, ResponseEvent
from shoal.clients.errors import ProtocolError
from shoal.clients.formats import ResponseFormat
from shoal.clients.types import (
    Answer,
    Choice,
    ChoiceDelta,
    Chunk,
    Completion,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)

Event_contra = TypeVar("Event_contra", contravariant=True)
Whole_co = TypeVar("Whole_co", covariant=True)
OneAnswer = TypeVar("OneAnswer", bound=Answer)


class Growing(Protocol[Event_contra, Whole_co]):
    """A streamed answer as far as it has come."""

    def add(self, event: Event_contra, /) -> None: ...

    def whole(self) -> Whole_co:
        """What the server would have answered without a stream.

        Raises:
            ProtocolError: the answer has not ended.
        """


class GrowingResponse:
    """A `Growing` of a response: its last event has all of it."""

    def __init__(self) -> None:
        self._last: ResponseEvent | None = None

    def add(self, event: ResponseEvent) -> None:
        self._last = event

    def whole(self) -> Response:
        if self._last is None or not self._last.is_last or self._last.response is None:
            raise ProtocolError("the stream ended before its response")
        return _with_headers(self._last.response, self._last)


class GrowingMessage:
    """A `Growing` of Anthropic's messages."""

    def __init__(self, response_format: ResponseFormat | None) -> None:
        self._response_format = response_format
        self._events: list[MessageEvent] = []

    def add(self, event: MessageEvent) -> None:
        self._events.append(event)

    def whole(self) -> MessageAnswer:
        if not self._events or not self._events[-1].is_last:
            raise ProtocolError("the stream ended before its message")
        build = partial(reading.message_of_events, self._response_format)
        return _with_headers(wire.checked(build, self._events, "the stream"), self._events[0])


class GrowingAnswer:
    """A `Growing` of completions and chats."""

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

    def whole(self) -> Completion[Any]:
        """If the server counted no tokens, `usage` has zeros."""
        if self._first is None or self._last is None:
            raise ProtocolError("the stream ended without an answer")
        grown = sorted(self._choices.items())
        prompt = next((one.prompt_token_ids for _, one in grown if one.prompt_token_ids is not None), None)
        answer: Completion[Any] = Completion(
            id=self._first.id,
            created=self._first.created,
            model=self._first.model,
            choices=tuple(one.choice(index, prompt, self._response_format) for index, one in grown),
            usage=self._usage or Usage(0, 0),
            seed=self._seed,
            system_fingerprint=self._first.system_fingerprint,
            timing=self._last.timing,
            receipt=self._last.receipt,
        )
        return _with_headers(answer, self._first)


def _with_headers(answer: OneAnswer, event: Answer) -> OneAnswer:
    return replace(answer, request_id=event.request_id, ignored_fields=event.ignored_fields)


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
    token_ids: list[int] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    finish_reason: str | None = None

    def add(self, delta: ChoiceDelta) -> None:
        self.texts.append(delta.text)
        self.reasoning.append(delta.reasoning)
        self.finish_reason = delta.finish_reason or self.finish_reason
        if delta.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs.extend(delta.logprobs)
        if delta.token_ids is not None:
            self.token_ids = self.token_ids or []
            self.token_ids.extend(delta.token_ids)
        if delta.prompt_token_ids is not None:
            self.prompt_token_ids = delta.prompt_token_ids
        for call in delta.tool_calls:
            self.calls.setdefault(call.index, _GrowingCall()).add(call)

    def choice(self, index: int, prompt: tuple[int, ...] | None, response_format: ResponseFormat | None) -> Choice[Any]:
        """The whole of it; `prompt` has the tokens of the first choice, which those of a chat share."""
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
            token_ids=None if self.token_ids is None else tuple(self.token_ids),
            prompt_token_ids=prompt if self.prompt_token_ids is None else self.prompt_token_ids,
            response_format=response_format,
        )
