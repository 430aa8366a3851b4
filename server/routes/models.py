"""GET /v1/models and /server_info: what is served, and how."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter
from starlette.responses import Response

from shoal.server.routes.answer import whole
from shoal.server.service import Service
from shoal.server.wire.responses import ModelCard, ModelList, ServerInfo


def models_router(service: Service) -> APIRouter:
    router = APIRouter()

    def card(name: str) -> ModelCard:
        return ModelCard(name, service.started, service.engine.ready.limits.max_model_len)

    @router.get("/v1/models")
    async def list_models() -> Response:
        return whole(ModelList([card(name) for name in service.model_names]))

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        service.check_model(name)
        return whole(card(name if name in service.model_names else service.model_name))

    @router.get("/server_info")
    async def get_server_info() -> Response:
        ready, settings = service.engine.ready, service.settings.sections()
        del settings["server"]["api_keys"]
        return whole(
            ServerInfo(
                version("shoal"),
                service.model_name,
                ready.num_parameters,
                ready.backend,
                ready.warning,
                ready.kv_cache_bytes,
                ready.limits,
                settings,
            )
        )

    return router
