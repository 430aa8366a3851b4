"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from shoal.server.embeddings import EmbeddingCall, numbers, resolve_pooling
from shoal.server.routes.answer import encode, unless_disconnected
from shoal.server.routes.pieces import HOLE, filled, in_pieces
from shoal.server.service import Service, new_id
from shoal.server.terms import resolve_terms
from shoal.server.wire.embeddings import Embedding, Embeddings, EmbeddingsBody, EmbeddingsUsage

MOST_AT_ONCE = 8  # vectors that are encoded before others have their turn


def embeddings_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def create_embeddings(request: Request) -> Response:
        body = await service.reader.read(request, EmbeddingsBody)
        service.check_model(body.model)
        pooling = resolve_pooling(service, body)
        service.engine.check_room()
        inputs = await service.prompts.of_embeddings(body)
        api_id = new_id("embd")
        terms = resolve_terms(service, request, body)
        call = EmbeddingCall(service, inputs, pooling, api_id=api_id, terms=terms)
        vectors = await unless_disconnected(request.receive, call.vectors()) or []
        num_tokens = sum(map(len, inputs))
        answer = Embeddings(HOLE, service.model_name, EmbeddingsUsage(num_tokens, num_tokens))
        entries = await _entries(vectors, in_base64=body.encoding_format == "base64")
        return in_pieces(filled(answer, [entries]), {"x-request-id": api_id})

    return router


async def _entries(vectors: Sequence[bytes], *, in_base64: bool) -> bytes:
    """The entries of the answer's list."""
    entries = []
    for index, vector in enumerate(vectors):
        if index % MOST_AT_ONCE == 0:
            await asyncio.sleep(0)
        entries.append(encode(Embedding(index, b64encode(vector).decode() if in_base64 else numbers(vector))))
    return b",".join(entries)
