"""Commands on their way to an engine, which may take none for a while."""

from __future__ import annotations

import asyncio

from shoal.server.engine.events import UsePolicy, Watch
from shoal.server.engine.messages import Abort, Begin, Command, EngineRequest, ForgetPrefixes, Stop, Submit

MAX_SIZE = 65536  # tokens and biases in one message, so that none takes long to encode


class Outbox:
    """Holds commands until there is room for the next message, and what is aborted meanwhile not even so long.

    So it holds no more than the requests that are unfinished, however many come and go while an engine hangs.
    """

    def __init__(self) -> None:
        self._requests: dict[str, EngineRequest] = {}
        self._aborted: dict[str, None] = {}
        self._forgets_prefixes = False
        self._latest: dict[type[Command], Command] = {}  # those before it count no more
        self._filled = asyncio.Event()

    def put(self, command: Command) -> None:
        match command:
            case Submit(requests):
                self._requests |= {request.request_id: request for request in requests}
            case Abort(request_ids):
                for request_id in request_ids:
                    if self._requests.pop(request_id, None) is None:
                        self._aborted[request_id] = None
            case ForgetPrefixes():
                self._forgets_prefixes = True
            case Watch() | UsePolicy() | Begin() | Stop():
                self._latest[type(command)] = command
        self._filled.set()

    async def get(self) -> Command:
        """The next message.  Aborts go first: a request that is submitted after its abort comes from another trial."""
        while not (self._requests or self._aborted or self._forgets_prefixes or self._latest):
            self._filled.clear()
            await self._filled.wait()
        if self._latest:
            return self._latest.pop(next(iter(self._latest)))
        if self._forgets_prefixes:
            self._forgets_prefixes = False
            return ForgetPrefixes()
        if self._aborted:
            aborted, self._aborted = self._aborted, {}
            return Abort(list(aborted))
        taken: list[EngineRequest] = []
        size = 0
        while self._requests and size < MAX_SIZE:
            taken.append(self._requests.pop(next(iter(self._requests))))
            size += _size(taken[-1])
        return Submit(taken)


def _size(request: EngineRequest) -> int:
    params = request.params
    tokens = request.prompt_token_ids, request.output_token_ids, params.stop_token_ids, params.logit_bias
    return sum(map(len, tokens))
