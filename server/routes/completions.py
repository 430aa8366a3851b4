"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from shoal.server.logprobs import completion_logprobs
from shoal.server.routes.answer import event
from shoal.server.routes.call import Call, Unset
from shoal.server.routes.schema import documented
from shoal.server.routes.streams import answered_once
from shoal.server.service import Service
from shoal.server.text import Delta, Scored
from shoal.server.wire.requests import CompletionBody, parse_body
from shoal.server.wire.responses import Completion, CompletionChoice, CompletionLogprobs, Usage


def completions_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=documented(CompletionBody))
    @answered_once(service)
    async def create_completion(request: Request) -> Response:
        body = parse_body(CompletionBody, await request.body())
        service.check_model(body.model)
        service.check_choices(body.num_prompts, body.n)
        prompts = await service.prompts.of_completion(body)
        return await _CompletionCall(service, request, body, prompts, await service.constraints.resolve(body)).answer()

    return router


class _CompletionCall(Call[CompletionBody]):
    id_prefix = "cmpl"

    def assemble(self, deltas: list[Delta], logprobs: list[Any]) -> Completion:
        choices = [self._choice(delta, shape) for delta, shape in zip(deltas, logprobs, strict=True)]
        return self._shape(choices, self.generation.usage, self.seed)

    def logprobs(self, scored: list[Scored]) -> CompletionLogprobs | None:
        return completion_logprobs(self.service.tokenizer, scored) if self.body.logprobs is not None else None

    async def chunks(self) -> AsyncGenerator[list[bytes], None]:
        seed: int | Unset = self.seed
        async with aclosing(self.generation.deltas()) as steps:
            async for deltas in steps:
                events = []
                for delta in deltas:
                    choice = self._choice(delta, self.logprobs(delta.scored))
                    events.append(event(self._shape([choice], self.usage_in_chunks, seed)))
                    seed = msgspec.UNSET  # reported once
                yield events
        if self.include_usage:
            yield [event(self._shape([], self.generation.usage))]

    def _choice(self, delta: Delta, logprobs: CompletionLogprobs | None) -> CompletionChoice:
        return CompletionChoice(delta.index, delta.text, logprobs, delta.finish_reason)

    def _shape(
        self, choices: list[CompletionChoice], usage: Usage | Unset | None, seed: int | Unset = msgspec.UNSET
    ) -> Completion:
        return Completion(self.id, self.created, self.service.model_name, choices, usage, seed)
