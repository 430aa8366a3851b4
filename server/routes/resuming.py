"""GET and DELETE /v1/streams/{stream_id}: streams that go on, wherever in a cluster they began."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import cache

from fastapi import APIRouter, Request
from starlette.responses import Response

from shoal.server.errors import NotFoundError, StreamExpiredError
from shoal.server.keys import known_key, owner_name
from shoal.server.peers import Origin
from shoal.server.routes.answer import unless_disconnected
from shoal.server.routes.chat import chat_router
from shoal.server.routes.completions import completions_router
from shoal.server.routes.inner import Endpoints, endpoints, inner_request
from shoal.server.routes.messages import messages_router
from shoal.server.routes.responses import responses_router
from shoal.server.routes.streams import deliver, last_event, maker
from shoal.server.service import Service
from shoal.server.streams import Answer

_KEY_HEADERS = ("authorization", "x-api-key")


def streams_router(service: Service) -> APIRouter:
    router = APIRouter()
    turns = asyncio.Lock()

    @cache
    def makers() -> Endpoints:
        return endpoints(service, chat_router, completions_router, messages_router, responses_router)

    def find(stream_id: str, request: Request) -> Answer:
        return service.streams.find(stream_id, known_key(request, service.api_keys))

    async def find_origin(stream_id: str, request: Request) -> Origin | None:
        """What a stream of this owner is made of that began elsewhere."""
        origin = await service.peers.find(stream_id) if service.peers is not None else None
        is_own = origin is not None and origin.owner == owner_name(known_key(request, service.api_keys))
        return origin if is_own else None

    async def find_or_make(stream_id: str, request: Request) -> Answer:
        """The stream that is held here, or else one that began elsewhere, made again.

        Raises:
            NotFoundError: there is neither.
            StreamExpiredError: here other tokens might be chosen.
            InvalidRequestError, QueueFullError, EngineUnavailableError: it cannot be made again.
        """
        with suppress(NotFoundError):
            return find(stream_id, request)
        async with turns:  # of many who ask for a stream, the first has it made
            try:
                return find(stream_id, request)
            except NotFoundError:
                origin = await find_origin(stream_id, request)
                if origin is None:
                    raise
            if origin.maker != maker(service):
                raise StreamExpiredError(f"the stream was made by {origin.maker}, and this server is {maker(service)}")
            headers = {name: request.headers[name] for name in _KEY_HEADERS if name in request.headers}
            headers |= {**origin.headers, "x-stream-resume": "true"}
            await makers()[origin.path](inner_request(origin.path, origin.body, headers, identity=origin.identity))
            answer = find(stream_id, request)
            answer.is_made_again = True
            return answer

    @router.get("/v1/streams/{stream_id}")
    async def read_stream(stream_id: str, request: Request) -> Response:
        answer = await find_or_make(stream_id, request)
        after = last_event(request, answer)
        if answer.is_made_again:
            await unless_disconnected(request.receive, service.streams.reach(answer, after))
        return await deliver(service, request, answer, after=after, takes_over=True)

    @router.delete("/v1/streams/{stream_id}")
    async def end_stream(stream_id: str, request: Request) -> Response:
        try:
            service.streams.forget(find(stream_id, request))
        except NotFoundError:
            if await find_origin(stream_id, request) is None:
                raise
        if service.peers is not None:
            await service.peers.forget(stream_id)
        return Response(status_code=204)

    return router
