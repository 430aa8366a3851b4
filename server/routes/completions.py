"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from server.generation import Delta, Generation
from server.logprobs import completion_logprobs
from server.routes.answer import EventStream, event, unless_disconnected, whole
from server.routes.schema import documented
from server.sampling import resolve_seed
from server.service import Service, new_id, unix_time
from server.wire.requests import CompletionBody, parse_body
from server.wire.responses import Completion, CompletionChoice, CompletionLogprobs, Usage


def completions_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=documented(CompletionBody))
    async def create_completion(request: Request) -> Response:
        body = parse_body(CompletionBody, await request.body())
        service.check_model(body.model)
        service.check_choices(body.num_prompts, body.n)
        prompts = await service.completion_prompts(body)
        answer = _Answer(service, body, prompts)
        headers = {"x-request-id": answer.id, "x-seed": str(answer.seed)}
        if body.stream:
            return EventStream(answer.chunks(), headers)
        return whole(await unless_disconnected(request.receive, answer.complete()), headers)

    return router


class _Answer:
    """One call's answer, in whichever form."""

    def __init__(self, service: Service, body: CompletionBody, prompts: list[tuple[str, list[int]]]) -> None:
        self.service = service
        self.body = body
        self.id = new_id("cmpl")
        self.created = unix_time()
        self.seed = resolve_seed(body)
        self.generation: Generation = service.generate(body, prompts, api_id=self.id, seed=self.seed)

    async def complete(self) -> Completion:
        choices = [CompletionChoice(index, "", None, None) for index in range(self.generation.num_choices)]
        async for deltas in self.generation.deltas():
            for delta in deltas:
                choice = choices[delta.index]
                choice.text += delta.text
                choice.finish_reason = delta.finish_reason
                choice.logprobs = _joined(choice.logprobs, self._logprobs(delta))
        return self._shape(choices, usage=self.generation.usage, seed=self.seed)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        include_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        usage = None if include_usage else msgspec.UNSET
        seed: int | msgspec.UnsetType = self.seed
        async with aclosing(self.generation.deltas()) as steps:
            async for deltas in steps:
                events = b""
                for delta in deltas:
                    choice = CompletionChoice(delta.index, delta.text, self._logprobs(delta), delta.finish_reason)
                    events += event(self._shape([choice], usage=usage, seed=seed))
                    seed = msgspec.UNSET  # reported once
                yield events
        if include_usage:
            yield event(self._shape([], usage=self.generation.usage))

    def _shape(
        self,
        choices: list[CompletionChoice],
        *,
        usage: Usage | msgspec.UnsetType | None,
        seed: int | msgspec.UnsetType = msgspec.UNSET,
    ) -> Completion:
        return Completion(self.id, self.created, self.service.model_name, choices, usage, seed)

    def _logprobs(self, delta: Delta) -> CompletionLogprobs | None:
        if self.body.logprobs is None:
            return None
        return completion_logprobs(self.service.tokenizer, delta.scored)


def _joined(first: CompletionLogprobs | None, second: CompletionLogprobs | None) -> CompletionLogprobs | None:
    if first is None or second is None:
        return first or second
    return CompletionLogprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        first.top_logprobs + second.top_logprobs,
        first.text_offset + second.text_offset,
    )
