"""One API call whose prompts become vectors."""

from __future__ import annotations

import asyncio
import sys
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from math import inf
from typing import Any, get_args, get_type_hints

from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import InvalidRequestError, QueueFullError
from shoal.scheduler.output import Pooling, SamplingParams
from shoal.server.engine.messages import EngineRequest
from shoal.server.engine.packing import TokenIds
from shoal.server.engine.submission import Submission
from shoal.server.errors import RequestTimeoutError
from shoal.server.service import Service
from shoal.server.terms import Terms
from shoal.server.wire.embeddings import EmbeddingsBody

METHODS = get_args(get_type_hints(Pooling)["method"])
MOST_PORTIONS = 3  # of one call in the engine, so that a step finds work while the answers of the one before travel
RETRY_SECONDS = 0.05


def resolve_pooling(service: Service, body: EmbeddingsBody) -> Pooling:
    """What the checkpoint and the body say.

    Raises:
        InvalidRequestError: `dimensions` is too large, or the checkpoint's method is none that is computed here.
    """
    method: Any = service.pooling
    if method not in METHODS:
        raise InvalidRequestError(
            f"the model pools embeddings by {method!r}, but this server knows {', '.join(METHODS)} only", param="model"
        )
    size = service.config.hidden_size
    if body.dimensions is not None and body.dimensions > size:
        raise InvalidRequestError(f"dimensions: {body.dimensions} exceeds the model's {size}", param="dimensions")
    return Pooling(method, body.dimensions or size)


def numbers(vector: bytes) -> list[float]:
    """Those of a vector as engines give it."""
    floats = array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return floats.tolist()


class EmbeddingCall:
    """The vectors of some inputs.

    They go to the engine portion by portion, so that a call of many inputs is not refused for their number, and
    others have their turn between them.

    Args:
        inputs: token ids of each.
        api_id: id of the API call, from which the ids of the engine's requests are made.
        terms: on which they are served.

    Raises:
        InvalidRequestError, RateLimitError, QueueFullError, EngineUnavailableError: the call is refused.
    """

    def __init__(
        self, service: Service, inputs: Sequence[TokenIds], pooling: Pooling, *, api_id: str, terms: Terms
    ) -> None:
        self._engine = service.engine
        self._metrics = service.metrics
        self._timeout = terms.timeout
        params = SamplingParams(max_tokens=0, temperature=0.0, seed=0, pooling=pooling)
        requests = [
            EngineRequest(f"{api_id}-{index}", token_ids, params, scheduling=terms.scheduling, speculates=False)
            for index, token_ids in enumerate(inputs)
        ]
        self._ids = [request.request_id for request in requests]
        self._vectors: dict[str, bytes] = {}
        self._portions = _portions(requests, self._engine.ready.limits)
        with terms.allowance.taking(requests, param="input"):
            first = self._engine.submit(next(self._portions), terms.timeout)
        self._running = deque([first])

    async def vectors(self) -> list[bytes]:
        """The vectors in the order of the inputs, float32 in little-endian order each.

        Raises:
            EngineError, EngineUnavailableError, RequestTimeoutError: it cannot go on.
        """
        reason = "abort"
        try:
            async with asyncio.timeout(None if self._timeout == inf else self._timeout):
                for portion in self._portions:
                    await self._submit(portion)
                while self._running:
                    await self._finish_first()
        except TimeoutError as error:
            reason = "error"
            raise RequestTimeoutError(f"the request was not finished in its timeout of {self._timeout:g} s") from error
        except Exception:
            reason = "error"
            raise
        finally:
            for submission in self._running:
                self._leave(submission, reason)
        return [self._vectors[request_id] for request_id in self._ids]

    async def _submit(self, portion: list[EngineRequest]) -> None:
        """Wait until there is room for a portion, and submit it."""
        while True:
            if len(self._running) == MOST_PORTIONS:
                await self._finish_first()
            try:
                self._running.append(self._engine.submit(portion))
                return
            except QueueFullError:  # others were first
                await (self._finish_first() if self._running else asyncio.sleep(RETRY_SECONDS))

    async def _finish_first(self) -> None:
        submission = self._running[0]
        while any(request_id not in self._vectors for request_id in submission.journals):
            for output in await submission.get():
                assert output.embedding is not None, "an embedding comes with the only news of its request"
                self._vectors[output.request_id] = output.embedding
                self._metrics.finished(submission.journals[output.request_id], "length", time.monotonic())
        self._leave(self._running.popleft(), "length")

    def _leave(self, submission: Submission, reason: str) -> None:
        self._engine.abort(submission.journals)
        if submission.timer is not None:
            submission.timer.cancel()
        for request_id, journal in submission.journals.items():
            if request_id not in self._vectors:
                self._metrics.finished(journal, reason, time.monotonic())


def _portions(requests: Sequence[EngineRequest], limits: SchedulerConfig) -> Iterator[list[EngineRequest]]:
    """Portions of as many requests and tokens as a step takes, at least one request each."""
    portion: list[EngineRequest] = []
    num_tokens = 0
    for request in requests:
        num_tokens += len(request.prompt_token_ids)
        if portion and (len(portion) == limits.max_num_seqs or num_tokens > limits.max_num_batched_tokens):
            yield portion
            portion, num_tokens = [], len(request.prompt_token_ids)
        portion.append(request)
    yield portion
