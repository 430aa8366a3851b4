"""GET /health, /ready, /metrics and /version: for those who run the server, without an API key."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from shoal.scheduler.admission import check_queue
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
        check_queue(service.engine.ready.limits, service.engine.num_unfinished, 1)
        return Response(status_code=200)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/version")
    async def get_version() -> Response:
        return whole({"version": version("shoal")})

    return router
