"""GET /health, /ready, /metrics and /version: for those who run the server, without an API key."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from shoal.server.routes.answer import whole
from shoal.server.service import Service


def operations_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        service.engine.check_health()
        return Response(status_code=200)

    @router.get("/ready")
    async def ready() -> Response:
        service.engine.check_health()
        service.engine.check_room()
        return Response(status_code=200)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/version")
    async def get_version() -> Response:
        return whole({"version": version("shoal")})

    return router
