"""POST /v1/chat/completions."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from shoal.server.engine.packing import TokenIds
from shoal.server.logprobs import chat_logprobs, id_text, plain_text
from shoal.server.peers import ids_of
from shoal.server.routes.answer import event
from shoal.server.routes.openai import OpenAICall, Unset
from shoal.server.routes.streams import answered_once
from shoal.server.service import Service
from shoal.server.text import Delta, Scored
from shoal.server.tools.answer import ChatAnswer
from shoal.server.wire.requests import ChatBody
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

    @router.post(_ChatCall.endpoint)
    @answered_once(service)
    async def create_chat_completion(request: Request) -> Response:
        body = await service.reader.read(request, ChatBody)
        service.check_model(body.model)
        service.prompts.check_choices(1, body.n)
        prompt = await service.prompts.of_chat(body, service.dialect.of_chat(body))
        grammar = await service.constraints.resolve(body, partial(service.dialect.grammar, body, prompt[0]))
        return await _ChatCall(service, request, body, prompt, grammar).answer()

    return router


class _ChatCall(OpenAICall[ChatBody]):
    endpoint = "/v1/chat/completions"
    id_prefix = "chatcmpl"
    scores_prompt_in_choices = False

    def __init__(
        self, service: Service, request: Request, body: ChatBody, prompt: tuple[str, TokenIds], grammar: str
    ) -> None:
        super().__init__(service, request, body, [prompt], grammar)
        self._is_begun = False
        reading, last = service.dialect.reading(body, prompt[0]), body.messages[-1]
        self._answers = [
            ChatAnswer(
                reading.reader(ids_of(self.id, index)),
                reading.counter(),
                shows_reasoning=body.include_reasoning,
                said=last.text if body.echo and last.role == "assistant" else "",
                calls_functions=body.functions is not None,
            )
            for index in range(self.generation.num_choices)
        ]

    @property
    def usage(self) -> Usage:
        usage = super().usage
        usage.completion_tokens_details.reasoning_tokens = sum(answer.num_reasoning_tokens for answer in self._answers)
        return usage

    def assemble(self, deltas: list[Delta], logprobs: list[Any]) -> ChatCompletion:
        choices = [
            ChatChoice(
                delta.index,
                answer.message(delta.text, delta.token_ids),
                shape,
                answer.finish_reason(delta.finish_reason),
                self.token_ids(delta),
            )
            for delta, answer, shape in zip(deltas, self._answers, logprobs, strict=True)
        ]
        return ChatCompletion(
            self.id,
            self.created,
            self.service.model_name,
            choices,
            self.service.fingerprint,
            self.usage,
            self.seed,
            self.prompt_token_ids(0),
            self.prompt_hole,
        )

    def events(self, deltas: list[Delta]) -> list[bytes]:
        events = [] if self._is_begun else self._opening()
        self._is_begun = True
        for delta in deltas:
            events += self._events_of(delta)
        return events

    def _opening(self) -> list[bytes]:
        choices = [ChatChunkChoice(index, answer.opening, None, None) for index, answer in enumerate(self._answers)]
        return self._encoded(choices, self.seed)

    def _events_of(self, delta: Delta) -> list[bytes]:
        """The text, and after it the finish reason in a chunk without text, as OpenAI sends them."""
        answer = self._answers[delta.index]
        parts = answer.deltas(delta.text, delta.token_ids, is_last=delta.finish_reason is not None)
        if self.is_plain(delta) and len(parts) == 1 and (content := parts[0].only_content) is not None:
            return [self.text_event(delta.index, content)]
        if delta.scored and not parts:
            parts = [answer.nothing]
        choices = [ChatChunkChoice(delta.index, part, None, None) for part in parts]
        if not choices and delta.token_ids and self.body.return_token_ids:
            choices = [ChatChunkChoice(delta.index, answer.nothing, None, None)]
        if choices:
            choices[0].logprobs = self.logprobs(delta.scored)
            choices[0].token_ids = self.token_ids(delta)
        if delta.finish_reason:
            finish_reason = answer.finish_reason(delta.finish_reason)
            choices.append(ChatChunkChoice(delta.index, ChatDelta(), None, finish_reason))
        return self._encoded(choices)

    def plain_event(self, index: int, text: Any) -> bytes:
        return self._encoded([ChatChunkChoice(index, ChatDelta(content=text), self.logprobs([]), None)])[0]

    def empty_chunk(self) -> ChatCompletionChunk:
        return self._shape([], self.usage)

    def _encoded(self, choices: list[ChatChunkChoice], seed: int | Unset = msgspec.UNSET) -> list[bytes]:
        return [event(self._shape([choice], self.usage_in_chunks, seed)) for choice in choices]

    def _shape(
        self, choices: list[ChatChunkChoice], usage: Usage | Unset | None, seed: int | Unset = msgspec.UNSET
    ) -> ChatCompletionChunk:
        service, is_first = self.service, seed is not msgspec.UNSET
        return ChatCompletionChunk(
            self.id,
            self.created,
            service.model_name,
            choices,
            service.fingerprint,
            usage,
            seed,
            self.prompt_token_ids(0) if is_first else msgspec.UNSET,
        )

    def logprobs(self, scored: list[Scored]) -> ChatLogprobs | None:
        name = id_text if self.body.return_tokens_as_token_ids else plain_text
        return chat_logprobs(self.service.tokenizer, scored, name) if self.body.logprobs else None
