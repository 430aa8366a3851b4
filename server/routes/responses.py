"""POST /v1/responses, and what becomes of responses that are kept: OpenAI's Responses API over chats."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from fastapi import APIRouter, Request
from msgspec.structs import replace
from starlette.responses import Response

from shoal.scheduler.admission import check_request
from shoal.scheduler.errors import ContextLengthError, InvalidRequestError, ShoalError
from shoal.server.engine.packing import TokenIds
from shoal.server.errors import ErrorShape, NotFoundError, error_body, http_error
from shoal.server.keys import known_key
from shoal.server.peers import ids_of
from shoal.server.responses.conversation import chat_of, in_own_words, items_of, own_words
from shoal.server.responses.output import Output, Scores
from shoal.server.responses.store import Kept
from shoal.server.routes.answer import encode, event, whole
from shoal.server.routes.call import Call
from shoal.server.routes.pieces import in_pieces
from shoal.server.routes.streams import answered_once, deliver, hold, idempotency_key, is_held, only_event
from shoal.server.service import Service, new_id, unix_time
from shoal.server.sinks import Sink
from shoal.server.streams import Answer
from shoal.server.text import Delta, Scored
from shoal.server.tools.answer import ChatAnswer
from shoal.server.wire.item_events import (
    Completed,
    Created,
    ErrorEvent,
    Failed,
    Incomplete,
    InProgress,
    ItemEvent,
    Queued,
)
from shoal.server.wire.items import (
    DeletedResponse,
    IncompleteDetails,
    InputTokens,
    InputTokensDetails,
    Item,
    ItemPage,
    ItemsQuery,
    OutputTokensDetails,
    ReasoningConfig,
    ResponseError,
    ResponseObject,
    ResponseQuery,
    ResponsesBody,
    ResponseUsage,
    TextConfig,
    TextFormat,
)
from shoal.server.wire.parsing import read_body
from shoal.server.wire.requests import ChatBody
from shoal.server.wire.responses import Told

logger = logging.getLogger("shoal.api")

_STATES: dict[str, Callable[..., ItemEvent]] = {
    "queued": Queued,
    "in_progress": InProgress,
    "completed": Completed,
    "incomplete": Incomplete,
    "failed": Failed,
}
_CODES: dict[int, Literal["invalid_prompt", "rate_limit_exceeded"]] = {
    400: "invalid_prompt",
    429: "rate_limit_exceeded",
}


def responses_router(service: Service) -> APIRouter:
    """What generates."""
    router = APIRouter()

    @router.post(_ResponsesCall.endpoint)
    @answered_once(service)
    async def create_response(request: Request) -> Response:
        body = await service.reader.read(request, ResponsesBody)
        service.prompts.check_choices(1, 1)
        with own_words():
            turn = await _prepare(service, request, body)
            demanded = partial(service.dialect.grammar, turn.chat, turn.prompt[0])
            grammar = await service.constraints.resolve(turn.chat, demanded)
            return await _ResponsesCall(service, request, turn, grammar).answer()

    return router


def kept_responses_router(service: Service) -> APIRouter:
    """What is asked of a response that is kept, and what costs no token."""
    router = APIRouter()

    def find(request: Request, response_id: str) -> Kept:
        return service.responses.find(response_id, known_key(request, service.api_keys))

    @router.post("/v1/responses/input_tokens")
    async def count_input_tokens(request: Request) -> Response:
        body = await service.reader.read(request, ResponsesBody)
        with own_words():
            turn = await _prepare(service, request, body)
        return whole(InputTokens(len(turn.prompt[1])))

    @router.get("/v1/responses/{response_id}")
    async def get_response(request: Request, response_id: str) -> Response:
        kept = find(request, response_id)
        query = read_body(ResponseQuery, dict(request.query_params), strict=False)
        if not query.stream:
            return whole(kept.response)
        if not kept.response.background:
            raise InvalidRequestError("stream: only a response with background true is read again so", param="stream")
        answer = service.streams.find(response_id, kept.owner)
        after = 0 if query.starting_after is None else query.starting_after + 1
        if after > answer.num_events:
            raise InvalidRequestError(
                f"starting_after: is {query.starting_after}, but there were only {answer.num_events} events",
                param="starting_after",
            )
        return await deliver(service, request, answer, after=after)

    @router.get("/v1/responses/{response_id}/input_items")
    async def list_input_items(request: Request, response_id: str) -> Response:
        items = list(find(request, response_id).before)
        query = read_body(ItemsQuery, dict(request.query_params), strict=False)
        return whole(_page(items, query))

    @router.post("/v1/responses/{response_id}/cancel")
    async def cancel_response(request: Request, response_id: str) -> Response:
        kept = find(request, response_id)
        if not kept.response.background:
            raise InvalidRequestError("only a response with background true can be cancelled")
        if not kept.response.is_ended:
            answer = service.streams.find(response_id, kept.owner)
            service.streams.forget(answer)
            assert answer.task is not None
            await asyncio.wait((answer.task,))
        return whole(kept.response)

    @router.delete("/v1/responses/{response_id}")
    async def delete_response(request: Request, response_id: str) -> Response:
        service.responses.forget(find(request, response_id))
        return whole(DeletedResponse(response_id))

    return router


class _Turn(NamedTuple):
    """What is asked, the conversation so far, the chat that goes on with it, and its prompt."""

    asked: ResponsesBody
    items: list[Item]
    chat: ChatBody
    prompt: tuple[str, TokenIds]


async def _prepare(service: Service, request: Request, body: ResponsesBody) -> _Turn:
    service.check_model(body.model)
    items = items_of(body, service.responses, known_key(request, service.api_keys))
    chat = chat_of(body, items)
    prompt = await (_fitted if body.truncation == "auto" else _prompt)(service, chat)
    return _Turn(body, items, chat, prompt)


async def _prompt(service: Service, chat: ChatBody) -> tuple[str, TokenIds]:
    return await service.prompts.of_chat(chat, service.dialect.of_chat(chat))


async def _fitted(service: Service, chat: ChatBody) -> tuple[str, TokenIds]:
    """The prompt of a chat, without its first messages if it would be too long: it goes on with a user's message.

    Raises:
        ContextLengthError: its last message is too long.
    """
    num_kept = 1 if chat.messages[0].role == "system" else 0
    kept, rest = chat.messages[:num_kept], chat.messages[num_kept:]
    starts = [0, *(at for at, message in enumerate(rest) if at and message.role == "user")]
    low, high, at = 0, len(starts) - 1, 0
    while True:
        chat.messages = kept + rest[starts[at] :]
        try:
            prompt = await _prompt(service, chat)
            check_request(service.engine.ready.limits, len(prompt[1]), chat.max_completion_tokens or 1)
            high = at
        except ContextLengthError:
            if at == len(starts) - 1:
                raise
            low = at + 1
        if at == low == high:
            return prompt
        at = (low + high) // 2


def _page(items: list[Item], query: ItemsQuery) -> ItemPage:
    """A part of a list of items.

    Raises:
        NotFoundError: it is to begin after an item that is none of them.
    """
    ordered = items[::-1] if query.order == "desc" else items
    begin = 0
    if query.after is not None:
        begin = next((at for at, item in enumerate(ordered, 1) if item.id == query.after), -1)
        if begin < 0:
            raise NotFoundError(f"after: there is no item {query.after[:100]!r}", param="after")
    data = ordered[begin : begin + query.limit]
    has_more = begin + len(data) < len(ordered)
    return ItemPage(data, has_more, data[0].id if data else None, data[-1].id if data else None)


def _stream_error(error: ShoalError) -> ErrorEvent:
    told = error_body(in_own_words(error) if isinstance(error, InvalidRequestError) else error).error
    return ErrorEvent(code=told.code, message=told.message, param=told.param, error=told)


STREAM_SHAPE = ErrorShape(_stream_error, "error", b"")


class _ResponsesCall(Call[ChatBody]):
    """One response.

    Attributes:
        response: as it is so far.
    """

    endpoint = "/v1/responses"
    id_prefix = "resp_"
    shape = STREAM_SHAPE

    def __init__(self, service: Service, request: Request, turn: _Turn, grammar: str) -> None:
        super().__init__(service, request, turn.chat, [turn.prompt], grammar)
        reading = service.dialect.reading(turn.chat, turn.prompt[0])
        self._asked = turn.asked
        if not turn.asked.is_whole:
            self.extras.instead = {"input": turn.items, "previous_response_id": None}
        self._scores = Scores(service.tokenizer)
        self._answer = ChatAnswer(reading.reader(ids := ids_of(self.id)), reading.counter())
        self._output = Output(self._answer, self._scores, ids)
        self._num_events = 0
        self._is_cut = False
        self._owner = known_key(request, service.api_keys)
        self.response = self._opening()
        self._kept = Kept(self._owner, self.response, turn.items)

    async def answer(self) -> Response:
        if not self._asked.background:
            return await super().answer()
        self.service.responses.keep(self._kept)
        is_stream, told = self._asked.stream, encode(self.response)
        key = idempotency_key(self.service, self.request) if is_stream else None
        answer = Answer(self.id, self._owner, self.headers, True, key, self.shape, needs_reader=False)
        self.service.streams.begin(answer, self.stream)
        await asyncio.sleep(0)  # what never began could not be ended
        if is_stream:
            return await deliver(self.service, self.request, answer)
        if not is_held(self.service, self.request, is_stream=False):
            return in_pieces([told], self.headers)
        told_once = only_event(_ready([told]))
        return await hold(
            self.service, self.request, new_id("resp_"), self.headers, told_once, is_stream=False, shape=self.shape
        )

    def logprobs(self, scored: list[Scored]) -> None:
        """Note the log-probabilities: they stand in the parts of messages, and not beside the choice."""
        self._scores.add(scored)

    def assemble(self, deltas: list[Delta], logprobs: list[Any]) -> ResponseObject:
        self._take(deltas[0])
        return self.response

    async def completed(self, answer: Told) -> Told:
        """The response has ended, and is kept with what it tells at its end."""
        await super().completed(answer)
        self._end("incomplete" if self._is_cut else "completed")
        return answer

    async def stream(self, sink: Sink) -> None:
        try:
            sink.put(self._sent([Created(response=self.response), self._state()]))
            await sink.flush()
        except asyncio.CancelledError:
            self.generation.close()
            self._end("cancelled")
            raise
        try:
            await super().stream(sink)
        except Exception as error:
            if not isinstance(error, ShoalError):
                logger.exception("a stream failed")
                error = ShoalError("internal error")
            sink.put(self._sent(self._fail(error)))
        finally:
            if not self.response.is_ended:
                self._end("cancelled")

    def events(self, deltas: list[Delta]) -> list[bytes]:
        told = [one for delta in deltas for one in self._take(delta)]
        if self.response.status == "queued":
            self.response.status = "in_progress"
            return self._sent([self._state(), *told])
        return self._sent(told)

    async def last_events(self) -> list[bytes]:
        await self.completed(self.response)
        return self._sent([self._state()])

    def _take(self, delta: Delta) -> list[ItemEvent]:
        """Add what is new; returns the events that tell of it."""
        self._scores.add(delta.scored)
        self._is_cut = delta.finish_reason == "length"
        return self._output.feed(delta.text, delta.token_ids, delta.finish_reason)

    def _fail(self, error: ShoalError) -> list[ItemEvent]:
        told, status = _stream_error(error), http_error(error).status
        self.response.error = ResponseError(_CODES.get(status, "server_error"), told.message)
        self._end("failed")
        return [told, self._state()]

    def _end(self, status: Literal["completed", "incomplete", "failed", "cancelled"]) -> None:
        """Finish the response, and keep it if it is to be kept."""
        response, store = self.response, self.service.responses
        self._output.close("incomplete")
        response.status = status
        response.usage = self._usage()
        if status == "completed":
            response.completed_at = unix_time()
        if status == "incomplete":
            response.incomplete_details = IncompleteDetails("max_output_tokens")
        if response.background:
            store.measure(self._kept)
        elif response.store and status in ("completed", "incomplete"):
            store.keep(self._kept)

    def _state(self) -> ItemEvent:
        """The event that tells of the state of the response."""
        return _STATES[self.response.status](response=self.response)

    def _sent(self, events: Sequence[ItemEvent]) -> list[bytes]:
        """The events as they are sent, with their numbers."""
        encoded = []
        for one in events:
            one.sequence_number = self._num_events
            self._num_events += 1
            encoded.append(event(one, one.kind))
        return encoded

    def _opening(self) -> ResponseObject:
        """The response before it has said anything: what was asked, with the defaults."""
        asked, defaults = self._asked, self.service.defaults
        return ResponseObject(
            id=self.id,
            created_at=self.created,
            status="queued" if asked.background else "in_progress",
            background=asked.background,
            instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens,
            max_tool_calls=asked.max_tool_calls,
            model=self.service.model_name,
            output=self._output.items,
            parallel_tool_calls=asked.parallel_tool_calls is not False,
            previous_response_id=asked.previous_response_id,
            prompt_cache_key=asked.prompt_cache_key,
            reasoning=asked.reasoning or ReasoningConfig(),
            safety_identifier=asked.safety_identifier,
            store=asked.store,
            temperature=_first(asked.temperature, defaults.temperature),
            text=replace(
                asked.text or TextConfig(), format=(asked.text and asked.text.format) or TextFormat(type="text")
            ),
            tool_choice=asked.tool_choice or "auto",
            tools=asked.tools or [],
            top_logprobs=asked.top_logprobs or 0,
            top_p=_first(asked.top_p, defaults.top_p),
            truncation=asked.truncation,
            user=asked.user,
            metadata=asked.metadata or {},
            seed=self.seed,
        )

    def _usage(self) -> ResponseUsage:
        used = self.generation.usage
        return ResponseUsage(
            used.prompt_tokens,
            InputTokensDetails(used.prompt_tokens_details.cached_tokens),
            used.completion_tokens,
            OutputTokensDetails(self._answer.num_reasoning_tokens),
            used.total_tokens,
        )


def _first(*values: float | None) -> float:
    """The first that is set; 1 changes nothing."""
    return next((value for value in values if value is not None), 1.0)


async def _ready(pieces: Sequence[bytes]) -> Sequence[bytes]:
    """What is there already, for those who wait."""
    return pieces
