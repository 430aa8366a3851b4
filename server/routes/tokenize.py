"""POST /tokenize and /detokenize."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from shoal.server.logprobs import token_text
from shoal.server.routes.answer import whole
from shoal.server.routes.pieces import HOLE, encode_entries, filled, in_pieces
from shoal.server.sampling import check_token_ids
from shoal.server.service import Service
from shoal.server.wire.requests import DetokenizeBody, TokenizeBody
from shoal.server.wire.responses import DetokenizeResult, TokenizeResult


def tokenize_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await service.reader.read(request, TokenizeBody)
        service.check_model(body.model)
        if body.messages is not None:
            tokens = list((await service.prompts.of_chat(body.chat, service.dialect.of_chat(body.chat)))[1])
        else:
            adds_special = body.add_special_tokens is not False
            (tokens,) = await service.prompts.encode_all([body.prompt or ""], add_special_tokens=adds_special)
        result = TokenizeResult(len(tokens), service.engine.ready.limits.max_model_len, HOLE)
        entries = [await encode_entries(tokens)]
        if body.return_token_strs:
            result.token_strs = HOLE
            entries.append(await encode_entries([token_text(service.tokenizer, one) for one in tokens]))
        return in_pieces(filled(result, entries))

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await service.reader.read(request, DetokenizeBody)
        service.check_model(body.model)
        check_token_ids("tokens", body.tokens, service.config.vocab_size)
        (text,) = await service.prompts.decode_all([body.tokens], skip_special_tokens=False)
        return whole(DetokenizeResult(text))

    return router
