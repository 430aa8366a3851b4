"""POST /v1/engine/plan: what `shoal plan` says, for the page."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from shoal.scheduler.errors import CheckpointError, ConfigError, InvalidRequestError
from shoal.server.routes.answer import whole
from shoal.server.service import Service
from shoal.server.wire.engine import PlanBody, Planned, PlanTable
from shoal.terminal import cell


def plan_router(service: Service) -> APIRouter:
    router = APIRouter()
    one_at_a_time = asyncio.Lock()  # a plan may measure this machine

    @router.post("/v1/engine/plan")
    async def make_plan(request: Request) -> Response:
        body = await service.reader.read(request, PlanBody)
        async with one_at_a_time:
            return whole(await asyncio.to_thread(_planned, service, body))

    return router


def _planned(service: Service, body: PlanBody) -> Planned:
    from shoal.model.checkpoint.parts import Fields  # noqa: PLC0415 (most servers are never asked)
    from shoal.server.planner.costs import Split  # noqa: PLC0415
    from shoal.server.planner.plan import make_plan  # noqa: PLC0415
    from shoal.server.planner.subject import imply_shapes, place, read_shapes  # noqa: PLC0415

    asked = Split(body.tp, body.ep, body.pp)
    try:
        if body.config is None:
            name, record = service.model_name, read_shapes(service.settings.model)
        else:
            name, record = "this config.json", imply_shapes(Fields(Path("config.json"), body.config))
        subject = place(record, body.machine, context=body.context, asked=asked)
    except CheckpointError as error:
        raise InvalidRequestError(error.message, param="config") from error
    except ConfigError as error:
        raise InvalidRequestError(error.message, param=error.param) from error
    plan = make_plan(name, subject, batch=body.batch, asked=asked)
    return Planned(
        plan.as_json(),
        [PlanTable(title, [*rows[0]], [[*map(cell, row.values())] for row in rows]) for title, rows in plan.tables()],
    )
