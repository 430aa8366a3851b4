"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from server.generation import Delta, Generation, Scored
from server.logprobs import chat_logprobs
from server.routes.answer import EventStream, event, unless_disconnected, whole
from server.routes.schema import documented
from server.sampling import resolve_seed
from server.service import Service, new_id, unix_time
from server.wire.requests import ChatBody, parse_body
from server.wire.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FinishReasonName,
    Usage,
)


def chat_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=documented(ChatBody))
    async def create_chat_completion(request: Request) -> Response:
        body = parse_body(ChatBody, await request.body())
        service.check_model(body.model)
        service.check_choices(1, body.n)
        prompt = await service.encode_chat(body.messages)
        answer = _Answer(service, body, prompt)
        headers = {"x-request-id": answer.id, "x-seed": str(answer.seed)}
        if body.stream:
            return EventStream(answer.chunks(), headers)
        return whole(await unless_disconnected(request.receive, answer.complete()), headers)

    return router


class _Answer:
    """One call's answer, in whichever form."""

    def __init__(self, service: Service, body: ChatBody, prompt: tuple[str, list[int]]) -> None:
        self.service = service
        self.body = body
        self.id = new_id("chatcmpl")
        self.created = unix_time()
        self.seed = resolve_seed(body)
        self.generation: Generation = service.generate(body, [prompt], api_id=self.id, seed=self.seed)

    async def complete(self) -> ChatCompletion:
        count = self.generation.num_choices
        texts = [""] * count
        scored: list[list[Scored]] = [[] for _ in range(count)]
        reasons: list[FinishReasonName] = ["stop"] * count
        async for deltas in self.generation.deltas():
            for delta in deltas:
                texts[delta.index] += delta.text
                scored[delta.index] += delta.scored
                reasons[delta.index] = delta.finish_reason or "stop"
        choices = [
            ChatChoice(index, ChatMessage(texts[index]), self._logprobs(scored[index]), reasons[index])
            for index in range(count)
        ]
        usage = self.generation.usage
        return ChatCompletion(self.id, self.created, self.service.model_name, choices, usage, self.seed)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        include_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        usage = None if include_usage else msgspec.UNSET
        role = ChatDelta(role="assistant", content="")
        openings = [ChatChunkChoice(index, role, None, None) for index in range(self.generation.num_choices)]
        opening = self._events(openings, usage, seed=self.seed)
        async with aclosing(self.generation.deltas()) as steps:
            async for deltas in steps:
                choices = [choice for delta in deltas for choice in self._chunk_choices(delta)]
                yield opening + self._events(choices, usage)
                opening = b""
        if include_usage:
            yield event(self._shape([], self.generation.usage))

    def _chunk_choices(self, delta: Delta) -> list[ChatChunkChoice]:
        """The text, and after it the finish reason in a chunk without text, as OpenAI sends them."""
        choices = []
        if delta.text or delta.scored:
            text = ChatDelta(content=delta.text)
            choices.append(ChatChunkChoice(delta.index, text, self._logprobs(delta.scored), None))
        if delta.finish_reason:
            choices.append(ChatChunkChoice(delta.index, ChatDelta(), None, delta.finish_reason))
        return choices

    def _events(
        self,
        choices: list[ChatChunkChoice],
        usage: msgspec.UnsetType | None,
        seed: int | msgspec.UnsetType = msgspec.UNSET,
    ) -> bytes:
        return b"".join(event(self._shape([choice], usage, seed)) for choice in choices)

    def _shape(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | msgspec.UnsetType | None,
        seed: int | msgspec.UnsetType = msgspec.UNSET,
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(self.id, self.created, self.service.model_name, choices, usage, seed)

    def _logprobs(self, scored: list[Scored]) -> ChatLogprobs | None:
        return chat_logprobs(self.service.tokenizer, scored) if self.body.logprobs else None
