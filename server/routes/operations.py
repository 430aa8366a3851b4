"""GET /health, /ready, /live, /ping, /load, /metrics and /version: for those who run the server, without an API key."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from shoal.server.routes.answer import whole
from shoal.server.service import Service


def operations_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health", response_class=Response)
    @router.get("/ping", name="ping", response_class=Response)
    @router.post("/ping", name="post_ping", response_class=Response)
    async def health() -> Response:
        service.engine.check_health()
        return Response(status_code=200)

    @router.get("/ready", response_class=Response)
    async def ready() -> Response:
        service.engine.check_health()
        service.engine.check_room()
        return Response(status_code=200)

    @router.get("/live", response_class=Response)
    async def live() -> Response:
        return Response(status_code=200)

    @router.get("/load")
    async def load() -> Response:
        return whole({"server_load": service.metrics.num_in_flight})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        text, media_type = await service.metrics.render(request.headers.get("accept", ""))
        return Response(text, media_type=media_type)

    @router.get("/version")
    async def get_version() -> Response:
        return whole({"version": version("shoal")})

    return router
