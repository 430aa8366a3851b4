"""GET /v1/engine/...: the engine's steps as they are made, and what the page does with the engine beside that."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.errors import ErrorShape, NotFoundError
from shoal.server.keys import known_key
from shoal.server.load import LoadRunner
from shoal.server.logprobs import token_text
from shoal.server.routes.answer import EventStream, whole
from shoal.server.scheduling import client_of
from shoal.server.service import Service
from shoal.server.sinks import poured
from shoal.server.wire.engine import EngineQuery, LoadBody, RequestTokens, StepsBody
from shoal.server.wire.parsing import read_body

EVENTS_SHAPE = ErrorShape(done=b"")


def engine_router(service: Service) -> APIRouter:
    router = APIRouter()
    loads = LoadRunner(service)

    @router.get("/v1/engine/events")
    async def get_engine_events(request: Request) -> Response:
        engine = read_body(EngineQuery, dict(request.query_params), strict=False).engine
        logs = service.engine.logs
        if engine >= len(logs):
            raise InvalidRequestError(f"engine: must be at most {len(logs) - 1}, not {engine}", param="engine")
        events = logs[engine].follow(request.headers.get("last-event-id", ""))
        return EventStream(poured(events), {}, shape=EVENTS_SHAPE)

    @router.post("/v1/engine/steps", response_class=Response)
    async def tell_steps_singly(request: Request) -> Response:
        body = await service.reader.read(request, StepsBody)
        for log in service.engine.logs:
            log.tell_singly(body.num_steps)
        return Response(status_code=200)

    @router.get("/v1/engine/requests/{request_id}")
    async def get_request_tokens(request_id: str, request: Request) -> Response:
        key = known_key(request, service.api_keys)
        for journal in service.engine.journals():
            asked = journal.request
            if asked.request_id == request_id and (key is None or asked.scheduling.client == client_of(key)):
                token_ids = [*asked.prompt_token_ids, *journal.output_token_ids]
                texts = [token_text(service.tokenizer, one) for one in token_ids]
                return whole(RequestTokens(request_id, len(asked.prompt_token_ids), texts))
        raise NotFoundError(f"no request {request_id[:64]!r} of yours is unfinished")

    @router.get("/v1/engine/loads")
    async def list_loads() -> Response:
        return whole(loads.all())

    @router.post("/v1/engine/loads")
    async def start_load(request: Request) -> Response:
        body = await service.reader.read(request, LoadBody)
        return whole(await loads.start(body, known_key(request, service.api_keys)))

    @router.delete("/v1/engine/loads/{load_id}")
    async def end_load(load_id: str) -> Response:
        return whole(loads.end(load_id))

    return router
