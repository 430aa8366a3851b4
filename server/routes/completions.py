"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from shoal.server.logprobs import completion_logprobs, id_text, token_text
from shoal.server.routes.answer import event
from shoal.server.routes.openai import OpenAICall, Unset
from shoal.server.routes.streams import answered_once
from shoal.server.service import Service
from shoal.server.text import Delta, Scored
from shoal.server.wire.requests import CompletionBody
from shoal.server.wire.responses import Completion, CompletionChoice, CompletionLogprobs, Usage


def completions_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post(_CompletionCall.endpoint)
    @answered_once(service)
    async def create_completion(request: Request) -> Response:
        body = await service.reader.read(request, CompletionBody)
        service.check_model(body.model)
        service.prompts.check_choices(body.num_prompts, body.n)
        prompts = await service.prompts.of_completion(body)
        return await _CompletionCall(service, request, body, prompts, await service.constraints.resolve(body)).answer()

    return router


class _CompletionCall(OpenAICall[CompletionBody]):
    endpoint = "/v1/completions"
    id_prefix = "cmpl"

    def assemble(self, deltas: list[Delta], logprobs: list[Any]) -> Completion:
        choices = [self._choice(delta, shape) for delta, shape in zip(deltas, logprobs, strict=True)]
        for choice in choices:
            choice.prompt_token_ids = self.prompt_token_ids(choice.index)
            choice.prompt_logprobs = self.prompt_hole
        return self._shape(choices, self.usage, self.seed)

    def logprobs(self, scored: list[Scored]) -> CompletionLogprobs | None:
        if self.body.logprobs is None:
            return None
        name = id_text if self.body.return_tokens_as_token_ids else token_text
        return completion_logprobs(self.service.tokenizer, scored, name)

    async def chunks(self) -> AsyncGenerator[list[bytes], None]:
        seed: int | Unset = self.seed
        unnamed = set(range(self.generation.num_choices))  # choices of whose prompt nothing was said
        async with aclosing(self.generation.deltas()) as steps:
            async for deltas in steps:
                events = []
                for delta in deltas:
                    choice = self._choice(delta, self.logprobs(delta.scored))
                    if delta.index in unnamed:
                        choice.prompt_token_ids = self.prompt_token_ids(delta.index)
                        unnamed.discard(delta.index)
                    events.append(event(self._shape([choice], self.usage_in_chunks, seed)))
                    seed = msgspec.UNSET  # reported once
                yield events
        if self.stream_options.include_usage or self.extras.are_asked:
            yield [event(await self.extras.add(self._shape([], self.usage), self.generation))]

    def _choice(self, delta: Delta, logprobs: CompletionLogprobs | None) -> CompletionChoice:
        return CompletionChoice(delta.index, delta.text, logprobs, delta.finish_reason, self.token_ids(delta))

    def _shape(
        self, choices: list[CompletionChoice], usage: Usage | Unset | None, seed: int | Unset = msgspec.UNSET
    ) -> Completion:
        service = self.service
        return Completion(self.id, self.created, service.model_name, choices, service.fingerprint, usage, seed)
