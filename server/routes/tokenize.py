"""POST /tokenize and /detokenize."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.routes.answer import whole
from shoal.server.routes.pieces import HOLE, encode_entries, filled, in_pieces
from shoal.server.routes.schema import documented
from shoal.server.sampling import check_token_ids
from shoal.server.service import Service
from shoal.server.wire.requests import DetokenizeBody, TokenizeBody, parse_body
from shoal.server.wire.responses import DetokenizeResult, TokenizeResult


def tokenize_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", openapi_extra=documented(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        body = parse_body(TokenizeBody, await request.body())
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("give either prompt or messages", param="prompt")
        if body.messages is not None:
            conversation = service.dialect.conversation(
                body.messages,
                tools=body.tools or [],
                variables=body.chat_template_kwargs,
                add_generation_prompt=body.add_generation_prompt,
            )
            _, tokens = await service.prompts.of_chat(conversation, parses_special=body.parse_special)
        else:
            (tokens,) = await service.prompts.encode_all(
                [body.prompt or ""], add_special_tokens=body.add_special_tokens
            )
        result = TokenizeResult(len(tokens), service.engine.ready.limits.max_model_len, HOLE)
        return in_pieces(filled(result, [await encode_entries(tokens)]))

    @router.post("/detokenize", openapi_extra=documented(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        body = parse_body(DetokenizeBody, await request.body())
        service.check_model(body.model)
        check_token_ids("tokens", body.tokens, service.config.vocab_size)
        (text,) = await service.prompts.decode_all([body.tokens], skip_special_tokens=False)
        return whole(DetokenizeResult(text))

    return router
