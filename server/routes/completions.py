"""POST /v1/completions."""

from __future__ import annotations

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

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._begun: set[int] = set()  # choices of which something was said

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

    def events(self, deltas: list[Delta]) -> list[bytes]:
        return [self._event(delta) for delta in deltas]

    def _event(self, delta: Delta) -> bytes:
        is_first = delta.index not in self._begun
        if not is_first and self.is_plain(delta):
            return self.text_event(delta.index, delta.text)
        choice = self._choice(delta, self.logprobs(delta.scored))
        if is_first:
            choice.prompt_token_ids = self.prompt_token_ids(delta.index)
        seed = msgspec.UNSET if self._begun else self.seed  # reported once
        self._begun.add(delta.index)
        return event(self._shape([choice], self.usage_in_chunks, seed))

    def plain_event(self, index: int, text: Any) -> bytes:
        return event(self._shape([self._choice(Delta(index, text), self.logprobs([]))], self.usage_in_chunks))

    def empty_chunk(self) -> Completion:
        return self._shape([], self.usage)

    def _choice(self, delta: Delta, logprobs: CompletionLogprobs | None) -> CompletionChoice:
        return CompletionChoice(delta.index, delta.text, logprobs, delta.finish_reason, self.token_ids(delta))

    def _shape(
        self, choices: list[CompletionChoice], usage: Usage | Unset | None, seed: int | Unset = msgspec.UNSET
    ) -> Completion:
        service = self.service
        return Completion(self.id, self.created, service.model_name, choices, service.fingerprint, usage, seed)
