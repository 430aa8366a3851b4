"""What both kinds of completion have in common: one API call, answered whole or as a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
from fastapi import Request
from starlette.responses import Response

from shoal.server.engine.packing import TokenIds
from shoal.server.errors import OPENAI, ErrorShape
from shoal.server.generation import Generation
from shoal.server.peers import Identity, keep_identity
from shoal.server.routes.answer import EventStream, unless_disconnected
from shoal.server.routes.extras import Extras
from shoal.server.routes.pieces import Entries, filled, in_pieces
from shoal.server.routes.streams import hold, is_held, only_event
from shoal.server.sampling import resolve_seed
from shoal.server.service import Service, new_id, unix_time
from shoal.server.sinks import Sink
from shoal.server.terms import resolve_terms
from shoal.server.text import Delta, Scored
from shoal.server.wire.requests import ChatBody, CompletionBody
from shoal.server.wire.responses import Told

Body = TypeVar("Body", CompletionBody, ChatBody)


class Call(ABC, Generic[Body]):
    """One call, submitted to the engine.

    Raises:
        InvalidRequestError, RateLimitError, QueueFullError, EngineUnavailableError: it is refused.
    """

    endpoint: ClassVar[str]
    id_prefix: ClassVar[str]
    shape: ErrorShape = OPENAI

    def __init__(
        self, service: Service, request: Request, body: Body, prompts: Sequence[tuple[str, TokenIds]], grammar: str
    ) -> None:
        self.service = service
        self.request = request
        self.body: Body = body
        new = Identity(new_id(self.id_prefix), unix_time(), resolve_seed(body))
        self.id, self.created, self.seed = keep_identity(request, new)
        if body.request_id is not None:
            request.state.request_id = body.request_id
        self.extras = Extras(service, request, body, self.endpoint)
        terms = resolve_terms(service, request, body)
        self.generation = Generation(service, body, prompts, grammar, api_id=new.id, seed=self.seed, terms=terms)

    @property
    def headers(self) -> dict[str, str]:
        return {"x-request-id": self.id, "x-seed": str(self.seed), **self.shape.headers}

    async def answer(self) -> Response:
        """Answer as the body asks."""
        headers = self.headers
        if is_held(self.service, self.request, is_stream=self.body.stream):
            work = self.stream if self.body.stream else only_event(self.complete())
            if self.body.stream and self.service.peers is not None:
                self.generation.news.keep_order()
            is_stream, shape = self.body.stream, self.shape
            return await hold(self.service, self.request, self.id, headers, work, is_stream=is_stream, shape=shape)
        if self.body.stream:
            return EventStream(self.stream, headers, shape=self.shape)
        return in_pieces(await unless_disconnected(self.request.receive, self.complete()) or [], headers)

    async def stream(self, sink: Sink) -> None:
        """Make the answer as server-sent events."""
        await self.generation.run(lambda deltas: sink.put(self.events(deltas)), sink)
        if last := await self.last_events():
            sink.put(last)

    async def complete(self) -> list[bytes | bytearray]:
        """The whole answer, in pieces."""
        count = self.generation.num_choices
        shapes = [self.logprobs([]) for _ in range(count)]
        entries = Entries(shapes)
        deltas = await self.generation.complete(lambda index, scored: entries.add(index, self.logprobs(scored)))
        pieces: list[bytearray] = []
        for index in range(count):
            pieces += entries.encoded(index)
            pieces += await self.more_entries(index)
        return filled(await self.completed(self.assemble(deltas, shapes)), pieces)

    async def more_entries(self, index: int) -> list[bytearray]:
        """The entries of long lists that stand behind a choice's log-probabilities in the answer."""
        return []

    async def completed(self, answer: Told) -> Told:
        """A whole answer with what it is to tell at its end."""
        return await self.extras.add(answer, self.generation)

    @abstractmethod
    def logprobs(self, scored: list[Scored]) -> msgspec.Struct | None:
        """The shape of log-probabilities, if they were asked for."""

    @abstractmethod
    def assemble(self, deltas: list[Delta], logprobs: list[Any]) -> Told:
        """The whole answer of all choices and the shapes of their log-probabilities."""

    @abstractmethod
    def events(self, deltas: list[Delta]) -> list[bytes]:
        """The events of what is new."""

    async def last_events(self) -> list[bytes]:
        """Those that come when all is said."""
        return []
