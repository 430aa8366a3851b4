"""GET /v1/models."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from shoal.server.routes.answer import whole
from shoal.server.service import Service
from shoal.server.wire.responses import ModelCard, ModelList


def models_router(service: Service) -> APIRouter:
    router = APIRouter()

    def card() -> ModelCard:
        return ModelCard(service.model_name, service.started, service.engine.limits.max_model_len)

    @router.get("/v1/models")
    async def list_models() -> Response:
        return whole(ModelList([card()]))

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        service.check_model(name)
        return whole(card())

    return router
