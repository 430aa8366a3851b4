"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, over chats."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from shoal.server.engine.packing import TokenIds
from shoal.server.peers import ids_of
from shoal.server.routes.answer import event, whole
from shoal.server.routes.call import Call
from shoal.server.routes.streams import answered_once
from shoal.server.service import Service
from shoal.server.shapes import anthropic, shape_of
from shoal.server.text import Delta, Scored
from shoal.server.tools.answer import ChatAnswer
from shoal.server.tools.blocks import AnswerBlocks, content
from shoal.server.wire.message_answers import (
    ContentBlock,
    MessageAnswer,
    MessageDelta,
    MessageStart,
    MessageStop,
    Ping,
    Stop,
    Tagged,
    TokenCount,
    Usage,
)
from shoal.server.wire.messages import CountBody, MessagesBody
from shoal.server.wire.requests import ChatBody


def messages_router(service: Service) -> APIRouter:
    router = APIRouter()

    async def prompt_of(chat: ChatBody) -> tuple[str, TokenIds]:
        return await service.prompts.of_chat(chat, service.dialect.of_chat(chat))

    @router.post(_MessageCall.endpoint)
    @answered_once(service)
    async def create_message(request: Request) -> Response:
        body = await service.reader.read(request, MessagesBody)
        service.check_model(body.model)
        service.prompts.check_choices(1, 1)
        chat = body.chat()
        prompt = await prompt_of(chat)
        # As many as fit, for clients send what the models of Anthropic hold.
        chat.max_tokens = min(body.max_tokens, service.engine.ready.limits.max_model_len)
        grammar = await service.constraints.resolve(chat, partial(service.dialect.grammar, chat, prompt[0]))
        return await _MessageCall(service, request, chat, prompt, grammar, max_tokens=body.max_tokens).answer()

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        body = await service.reader.read(request, CountBody)
        service.check_model(body.model)
        _, token_ids = await prompt_of(body.chat())
        return whole(TokenCount(len(token_ids)), dict(shape_of(request.scope).headers))

    return router


class _MessageCall(Call[ChatBody]):
    """A chat whose answer is a message.

    Args:
        max_tokens: that the request asks for, which may be more than the context holds.
    """

    endpoint = "/v1/messages"
    id_prefix = "msg_"

    def __init__(
        self,
        service: Service,
        request: Request,
        chat: ChatBody,
        prompt: tuple[str, TokenIds],
        grammar: str,
        *,
        max_tokens: int,
    ) -> None:
        super().__init__(service, request, chat, [prompt], grammar)
        self.shape = anthropic(self.id)
        self._max_tokens = max_tokens
        self._answer = ChatAnswer(service.dialect.reading(chat, prompt[0]).reader(ids_of(self.id)))
        self._blocks = AnswerBlocks(self._answer)
        self._last: Delta | None = None

    def logprobs(self, scored: list[Scored]) -> None:
        return None

    def assemble(self, deltas: list[Delta], logprobs: list[Any]) -> MessageAnswer:
        (delta,) = deltas
        answer = self._message(content(self._blocks.events(delta.text, is_last=True)))
        stop = self._stop(delta)
        answer.stop_reason, answer.stop_sequence = stop.stop_reason, stop.stop_sequence
        return answer

    def events(self, deltas: list[Delta]) -> list[bytes]:
        events: list[Tagged] = [] if self._last else [MessageStart(self._message([])), Ping()]
        for self._last in deltas:
            events += self._blocks.events(self._last.text, is_last=self._last.finish_reason is not None)
        return [event(one, one.type) for one in events]

    async def last_events(self) -> list[bytes]:
        assert self._last is not None
        end = await self.extras.add(MessageDelta(self._stop(self._last), self._usage), self.generation)
        return [event(one, one.type) for one in (end, MessageStop())]

    def _message(self, blocks: list[ContentBlock]) -> MessageAnswer:
        return MessageAnswer(self.id, self.service.model_name, blocks, self._usage)

    def _stop(self, delta: Delta) -> Stop:
        """Why the answer has ended, once all of it was read."""
        if delta.stop_string is not None:
            return Stop("stop_sequence", delta.stop_string)
        match self._answer.finish_reason(delta.finish_reason):
            case "tool_calls":
                return Stop("tool_use", None)
            case "length" if self._usage.output_tokens < self._max_tokens:
                return Stop("model_context_window_exceeded", None)
            case "length":
                return Stop("max_tokens", None)
        return Stop("end_turn", None)

    @property
    def _usage(self) -> Usage:
        used = self.generation.usage
        num_cached = used.prompt_tokens_details.cached_tokens
        return Usage(used.prompt_tokens - num_cached, used.completion_tokens, num_cached)
