"""The engine in process: the same requests, scheduler and tokens as the server, without HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

from msgspec.structs import asdict

from shoal.scheduler.errors import ConfigError, InvalidRequestError
from shoal.server.embeddings import EmbeddingCall, numbers, resolve_pooling
from shoal.server.engine.local import LocalEngine
from shoal.server.errors import EngineUnavailableError
from shoal.server.generation import Generation
from shoal.server.sampling import resolve_seed
from shoal.server.service import Service, new_id
from shoal.server.settings import DEFAULT_MODEL, Settings, declared, resolve
from shoal.server.setup import build_service
from shoal.server.terms import Terms
from shoal.server.text import Delta, Scored
from shoal.server.wire.embeddings import MAX_INPUTS, EmbeddingsBody
from shoal.server.wire.parsing import read_body
from shoal.server.wire.requests import ChatBody, CompletionBody, NumLogprobs, SamplingBody

Prompt = str | list[int]
Value = TypeVar("Value")


class SamplingParams(SamplingBody):
    """How the tokens of a request are chosen, in the words and with the defaults of `/v1/completions`.

    Attributes:
        logprobs: log-probabilities of each chosen token and of this many alternatives are returned; None for none.

    Raises:
        InvalidRequestError: a field is unknown, of the wrong type, or out of range.
    """

    logprobs: NumLogprobs | None = None

    def __post_init__(self) -> None:
        read_body(CompletionBody, asdict(self) | {"prompt": ""})


@dataclass(frozen=True, slots=True)
class Output:
    """What became of a prompt, or of one of its `n` choices.

    Attributes:
        seed: that of the request; with it the same request gives the same tokens again.
        scored: the chosen tokens with their log-probabilities, if they were asked for.
    """

    prompt: str
    index: int
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"] | None
    seed: int
    scored: list[Scored]


class LLM:
    """A model and its engine, in threads of this process.

    It gives the tokens that the server gives.  Any thread may call it, and any event loop: requests that come together
    are computed together.

        with LLM("shoal-moe") as llm:
            for output in llm.generate(["import os\\n", "def main("], SamplingParams(max_tokens=32, temperature=0)):
                print(output.text)

    Args:
        model: checkpoint folder, GGUF file, or the name of a model.
        settings: those of the server by their names, such as `max_num_seqs=8` or `quantization="int8"`.  Neither
            `shoal.toml` nor the environment is read.

    Raises:
        CheckpointError, ConfigError: the model cannot be had, or a setting is wrong.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **settings: Any) -> None:
        self.settings = _resolve(model, settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="shoal-llm", daemon=True)
        self._thread.start()
        try:
            self._service, self._engine = self._wait(self._start())
        except BaseException:
            self._end_loop()
            raise

    # -- whole answers -------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]:
        """Complete prompts, each a text or a list of token ids.

        Args:
            params: for all prompts, or one for each.

        Returns:
            The outputs in the order of the prompts; the `n` choices of a prompt follow each other.

        Raises:
            InvalidRequestError: a prompt or its parameters can never be served.
        """
        return self._wait(self._generate(_bodies(prompts, params)))

    async def agenerate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]:
        """`generate`, awaited."""
        return await asyncio.wrap_future(self._submit(self._generate(_bodies(prompts, params))))

    def chat(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None) -> list[Output]:
        """Answer a conversation, whose messages have the shape of OpenAI's API; the `n` choices in order."""
        return self._wait(self._generate([_chat_body(messages, params)]))

    def embed(self, inputs: Prompt | Sequence[Prompt], *, dimensions: int | None = None) -> list[list[float]]:
        """A vector of length 1 for each input, a text or a list of token ids, in their order.

        Args:
            dimensions: numbers of each vector, at most the model's hidden size; as many if not set.
        """
        each = [inputs] if _is_one(inputs) else list(inputs)
        portions = [each[at : at + MAX_INPUTS] for at in range(0, len(each), MAX_INPUTS)]
        asked = [read_body(EmbeddingsBody, {"input": some, "dimensions": dimensions}) for some in portions]
        return [vector for body in asked for vector in self._wait(self._embed(body))]

    # -- answers as they come ------------------------------------------------------------------------------------

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Complete a prompt, and give its text piece by piece.  Leaving the iteration early ends the request."""
        deltas = self._deltas(*_bodies([prompt], params))
        try:
            while (delta := self._wait(_next(deltas))) is not None:
                yield delta
        finally:
            self._wait(deltas.aclose())

    async def astream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncGenerator[Delta, None]:
        """`stream`, for `async for`."""
        deltas = self._deltas(*_bodies([prompt], params))
        try:
            while (delta := await asyncio.wrap_future(self._submit(_next(deltas)))) is not None:
                yield delta
        finally:
            await asyncio.wrap_future(self._submit(deltas.aclose()))

    # -- life ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the engine and its threads; what is unfinished ends with an error."""
        if self._thread.is_alive():
            self._wait(self._engine.stop())
            self._wait(self._service.templates.close())
            if self._service.tracer is not None:
                self._wait(self._service.tracer.close())
            self._end_loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- in the event loop of this object ------------------------------------------------------------------------

    async def _start(self) -> tuple[Service, LocalEngine]:
        service, _ = build_service(self.settings)
        engine = LocalEngine(self.settings, service.clients[0])
        await engine.start()
        return service, engine

    async def _generate(self, bodies: Sequence[CompletionBody | ChatBody]) -> list[Output]:
        limits = self._service.engine.ready.limits
        most = max((body.n for body in bodies), default=1)
        room = asyncio.Semaphore(max(1, (limits.max_num_seqs + limits.max_num_waiting) // most))

        async def one(body: CompletionBody | ChatBody) -> list[Output]:
            async with room:
                return await self._complete(body)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(body)) for body in bodies]
        return [output for task in tasks for output in task.result()]

    async def _embed(self, body: EmbeddingsBody) -> list[list[float]]:
        inputs, pooling = await self._service.prompts.of_embeddings(body), resolve_pooling(self._service, body)
        call = EmbeddingCall(self._service, inputs, pooling, api_id=new_id("llm"), terms=Terms())
        return [numbers(vector) for vector in await call.vectors()]

    async def _complete(self, body: CompletionBody | ChatBody) -> list[Output]:
        prompt, seed, generation = await self._submit_body(body)
        return [
            Output(prompt, whole.index, whole.text, whole.token_ids, whole.finish_reason, seed, whole.scored)
            for whole in await generation.complete()
        ]

    async def _deltas(self, body: CompletionBody | ChatBody) -> AsyncGenerator[Delta, None]:
        _, _, generation = await self._submit_body(body)
        async with aclosing(generation.deltas()) as steps:
            async for deltas in steps:
                for delta in deltas:
                    yield delta

    async def _submit_body(self, body: CompletionBody | ChatBody) -> tuple[str, int, Generation]:
        """The text of the prompt, the seed, and what will come of them."""
        service, seed = self._service, resolve_seed(body)
        if isinstance(body, ChatBody):
            prompts = [await service.prompts.of_chat(body, service.dialect.conversation(body.messages))]
        else:
            prompts = await service.prompts.of_completion(body)
        grammar = await service.constraints.resolve(body)
        generation = Generation(service, body, prompts, grammar, api_id=new_id("llm"), seed=seed, terms=Terms())
        return prompts[0][0], seed, generation

    # -- from other threads --------------------------------------------------------------------------------------

    def _submit(self, work: Coroutine[Any, Any, Value]) -> Future[Value]:
        if self._loop.is_closed():
            work.close()
            raise EngineUnavailableError("this LLM is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, work: Coroutine[Any, Any, Value]) -> Value:
        future = self._submit(work)
        try:
            return future.result()
        except BaseException as error:
            future.cancel()  # after Ctrl-C its result is not needed
            if isinstance(error, ExceptionGroup):
                raise error.exceptions[0] from None
            raise

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _next(deltas: AsyncGenerator[Delta, None]) -> Delta | None:
    return await anext(deltas, None)


def _resolve(model: str, given: Mapping[str, Any]) -> Settings:
    """Settings from names without their sections, which are unique."""
    # What is asked in this process may wait.
    values: dict[str, Any] = {"model": model, "server": {"max_queue_seconds": 0, "max_queue_tokens": None}}
    for name, value in given.items():
        homes = [section for section, settings in declared().items() if name in settings]
        if not homes:
            raise ConfigError(f"{name}: unknown setting", param=name)
        values.setdefault(homes[0], {})[name] = value
    settings = resolve(values)
    if settings.engine.engines != 1:
        raise ConfigError("engines must be 1 for an LLM; `shoal serve` may have more", param="engines")
    return settings


def _bodies(
    prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[CompletionBody]:
    each: list[Any] = [prompts] if _is_one(prompts) else list(prompts)
    chosen = [params or SamplingParams()] * len(each) if not isinstance(params, Sequence) else list(params)
    if len(chosen) != len(each):
        raise InvalidRequestError(f"{len(each)} prompts were given, but {len(chosen)} params", param="params")
    return [
        read_body(CompletionBody, asdict(one) | {"prompt": prompt}) for prompt, one in zip(each, chosen, strict=True)
    ]


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))


def _chat_body(messages: Sequence[Mapping[str, Any]], params: SamplingParams | None) -> ChatBody:
    fields = asdict(params or SamplingParams())
    num_logprobs = fields.pop("logprobs")
    asked = {"messages": messages, "logprobs": num_logprobs is not None or None, "top_logprobs": num_logprobs}
    return read_body(ChatBody, fields | asked)
