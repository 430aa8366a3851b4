"""How the outputs of requests reach the call that waits for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from math import inf

from shoal.scheduler.errors import EngineError, InvalidRequestError
from shoal.scheduler.output import FinishReason, RequestOutput
from shoal.server.engine.journal import Journal
from shoal.server.engine.messages import EngineRequest
from shoal.server.errors import RequestTimeoutError, SlowClientError

# Tokens and alternatives that may wait for one client, some MiB in memory; how many of them, of how many outputs, are
# handed out at once, so that a client which reads again after a while does not hold up others; and how many of them
# are not worth a turn of their own.
MAX_BACKLOG, MAX_PORTION, MAX_OUTPUTS, MAX_AT_ONCE = 65536, 1024, 128, 128


class Submission:
    """Requests that were submitted together, and one stream of the outputs of all of them.

    Attributes:
        max_backlog: tokens and alternatives that may wait; whoever waits for all of it takes the limit away.
        on_news: called once for all outputs of a step; it may take them.  False has `get` go on.
        timer: ends the requests when their time has run out.
    """

    max_backlog: float = MAX_BACKLOG

    def __init__(self, requests: Sequence[EngineRequest], arrival_time: float) -> None:
        self.journals = {request.request_id: Journal(request, "", arrival_time) for request in requests}
        self._news: deque[RequestOutput] = deque()
        self._backlog = 0
        self._error: Exception | None = None
        self._arrived = asyncio.Event()
        self.on_news: Callable[[], bool] = bool
        self.timer: asyncio.TimerHandle | None = None

    def end_after(self, seconds: float, abort: Callable[[Iterable[str]], None]) -> None:
        """Abort the requests after so many seconds, and end the stream with an error."""

        def expire() -> None:
            abort(self.journals)
            self.fail(RequestTimeoutError(f"the request was not finished in its timeout of {seconds:g} s"))

        if seconds < inf:
            self.timer = asyncio.get_running_loop().call_later(seconds, expire)

    def put(self, output: RequestOutput) -> None:
        """Add an output, unless an error has ended the stream: after a gap nothing follows.  See `announce`."""
        if self._error is not None:
            return
        self._backlog += _size(output)
        if output.finish_reason is FinishReason.ERROR:
            self.fail(EngineError(f"the engine failed on this request: {output.error}"))
        elif output.finish_reason is FinishReason.INVALID:
            self.fail(InvalidRequestError(output.error or ""))
        elif self._backlog > self.max_backlog:
            self.fail(SlowClientError(f"the client does not read: {self._backlog} tokens and alternatives wait for it"))
        else:
            self._news.append(output)

    def announce(self) -> None:
        """Have what was put be taken, here and now if that can be."""
        if self._error is not None or self._backlog > MAX_AT_ONCE or not self.on_news():
            self._arrived.set()

    def fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._arrived.set()

    async def get(self) -> list[RequestOutput]:
        """Wait for outputs, and take them."""
        await self.wait()
        return self.take()

    async def wait(self) -> None:
        """Wait until there is something to take; others have their turn if there is already."""
        if self._news:
            await asyncio.sleep(0)
        await self._arrived.wait()

    def take(self) -> list[RequestOutput]:
        """Outputs that have come since the last call, if `on_news` took none.  Of many these are the first.

        Raises:
            EngineError: the engine failed on one of the requests, or died of it.
            InvalidRequestError: the grammar of one allows no token more.
            EngineUnavailableError: the server is shutting down.
            RequestTimeoutError: their time has run out.
            SlowClientError: too many outputs wait.
        """
        portion: list[RequestOutput] = []
        size = 0
        while self._news and size < MAX_PORTION and len(portion) < MAX_OUTPUTS:
            portion.append(self._news.popleft())
            size += _size(portion[-1])
        self._backlog -= size
        if self._error is None:
            if not self._news:
                self._arrived.clear()
        elif not portion:
            raise self._error
        return portion


def _size(output: RequestOutput) -> int:
    """Tokens and alternatives to them."""
    size = len(output.token_ids)
    for scored in (output.logprobs, output.prompt_logprobs):
        if scored:
            size += sum(len(one.top_token_ids) for one in scored)
    return size
