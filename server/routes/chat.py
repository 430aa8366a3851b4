"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from shoal.server.logprobs import chat_logprobs
from shoal.server.routes.answer import event
from shoal.server.routes.call import Call, Unset
from shoal.server.routes.schema import documented
from shoal.server.routes.streams import answered_once
from shoal.server.service import Service
from shoal.server.text import Delta, Scored
from shoal.server.tools.answer import ChatAnswer
from shoal.server.wire.requests import ChatBody, parse_body
from shoal.server.wire.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    Usage,
)


def chat_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=documented(ChatBody))
    @answered_once(service)
    async def create_chat_completion(request: Request) -> Response:
        body = parse_body(ChatBody, await request.body())
        service.check_model(body.model)
        service.check_choices(1, body.n)
        conversation = service.dialect.conversation(
            body.messages, tools=body.offered_tools, variables=body.template_variables
        )
        prompt = await service.prompts.of_chat(conversation, parses_special=body.parse_special)
        grammar = await service.constraints.resolve(body, partial(service.dialect.grammar, body, prompt[0]))
        return await _ChatCall(service, request, body, prompt, grammar).answer()

    return router


class _ChatCall(Call[ChatBody]):
    id_prefix = "chatcmpl"

    def __init__(
        self, service: Service, request: Request, body: ChatBody, prompt: tuple[str, list[int]], grammar: str
    ) -> None:
        super().__init__(service, request, body, [prompt], grammar)
        reading = service.dialect.reading(body, prompt[0])
        self._answers = [ChatAnswer(reading.reader()) for _ in range(self.generation.num_choices)]

    def assemble(self, deltas: list[Delta], logprobs: list[Any]) -> ChatCompletion:
        choices = [
            ChatChoice(delta.index, answer.message(delta.text), shape, answer.finish_reason(delta.finish_reason))
            for delta, answer, shape in zip(deltas, self._answers, logprobs, strict=True)
        ]
        usage = self.generation.usage
        return ChatCompletion(self.id, self.created, self.service.model_name, choices, usage, self.seed)

    async def chunks(self) -> AsyncGenerator[list[bytes], None]:
        openings = [ChatChunkChoice(index, answer.opening, None, None) for index, answer in enumerate(self._answers)]
        opening = self._events(openings, self.seed)
        async with aclosing(self.generation.deltas()) as steps:
            async for deltas in steps:
                yield opening + self._events([choice for delta in deltas for choice in self._chunk_choices(delta)])
                opening = []
        if self.include_usage:
            yield [event(self._shape([], self.generation.usage))]

    def _chunk_choices(self, delta: Delta) -> list[ChatChunkChoice]:
        """The text, and after it the finish reason in a chunk without text, as OpenAI sends them."""
        answer = self._answers[delta.index]
        parts = answer.deltas(delta.text, is_last=delta.finish_reason is not None)
        if delta.scored and not parts:
            parts = [answer.nothing]
        choices = [ChatChunkChoice(delta.index, part, None, None) for part in parts]
        if choices:
            choices[0].logprobs = self.logprobs(delta.scored)
        if delta.finish_reason:
            finish_reason = answer.finish_reason(delta.finish_reason)
            choices.append(ChatChunkChoice(delta.index, ChatDelta(), None, finish_reason))
        return choices

    def _events(self, choices: list[ChatChunkChoice], seed: int | Unset = msgspec.UNSET) -> list[bytes]:
        return [event(self._shape([choice], self.usage_in_chunks, seed)) for choice in choices]

    def _shape(
        self, choices: list[ChatChunkChoice], usage: Usage | Unset | None, seed: int | Unset = msgspec.UNSET
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(self.id, self.created, self.service.model_name, choices, usage, seed)

    def logprobs(self, scored: list[Scored]) -> ChatLogprobs | None:
        return chat_logprobs(self.service.tokenizer, scored) if self.body.logprobs else None
