"""Many engines as one: each request goes to where its prefix is, and on elsewhere when that engine is lost."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from math import inf
from operator import attrgetter

from shoal.scheduler.errors import QueueFullError, ShoalError
from shoal.scheduler.prefix_cache import extend_hashes, may_skip
from shoal.scheduler.routing import PrefixRouting
from shoal.server.engine.client import EngineClient, EngineState
from shoal.server.engine.journal import Journal
from shoal.server.engine.messages import EngineRequest, Ready
from shoal.server.engine.submission import Submission
from shoal.server.errors import EngineUnavailableError
from shoal.server.metrics import Metrics


class Router:
    """Implements `Engine` over the clients of several engines, all of which give the same tokens.

    A request is routed by its prefix and by the loads of the engines (`PrefixRouting`).  When its engine is lost it
    goes on at once at another one.  It waits for the next engine of its own client if there is no other, or if it may
    be what kills engines: the client then tries it alone.

    Args:
        clients: their owners connect them.
        clock: returns seconds.

    Attributes:
        clients: all that were ever added.
    """

    def __init__(
        self, clients: Iterable[EngineClient], metrics: Metrics, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clients: list[EngineClient] = []
        self._metrics = metrics
        self._clock = clock
        self._running: dict[int, Ready] = {}  # clients that have engines, by number
        self._routing = PrefixRouting()
        for client in clients:
            self.add(client)

    def add(self, client: EngineClient) -> None:
        """Route requests to this one too, once it has an engine."""
        client.changed = partial(self._take_change, len(self.clients))
        self.clients.append(client)

    # -- for HTTP: see `Engine` ----------------------------------------------------------------------------------

    @property
    def ready(self) -> Ready:
        if not self.clients:
            raise EngineUnavailableError("there is no engine; try again later")
        return self.clients[min(self._taking(), default=0)].ready

    @property
    def num_unfinished(self) -> int:
        return sum(client.num_unfinished for client in self.clients)

    def journals(self) -> list[Journal]:
        each = chain.from_iterable(client.journals() for client in self.clients)
        return sorted(each, key=attrgetter("arrival_time"))

    def check_health(self) -> None:
        self.ready  # noqa: B018 (raises)
        _any(client.check_health for client in self.clients)

    def check_room(self) -> None:
        self.ready  # noqa: B018 (raises)
        _any(self.clients[number].check_room for number in self._able())

    def submit(self, requests: Sequence[EngineRequest], timeout: float = inf) -> Submission:
        shares = self._admit(requests, timeout)
        submission = Submission(requests, self._clock())
        submission.end_after(timeout, self.abort)
        for number, share in shares.items():
            self.clients[number].adopt({request.request_id: submission for request in share}, are_new=True)
        return submission

    def forget_prefixes(self) -> None:
        self._routing.forget_prefixes()
        for client in self.clients:
            client.forget_prefixes()

    def abort(self, request_ids: Iterable[str]) -> None:
        aborted = list(request_ids)
        while having := [client for client in self.clients if client.has_any(aborted)]:
            having[0].abort(aborted)  # others of them may move where a trial has ended

    async def drain(self, seconds: float) -> None:
        """Refuse new requests; let the unfinished ones go on for a while, then end them with an error."""
        end = self._clock() + seconds
        await asyncio.gather(*(client.drain(seconds) for client in self.clients))
        while self.num_unfinished:  # they came to a client that had none left
            await asyncio.gather(*(client.drain(max(end - self._clock(), 0.0)) for client in self.clients))

    def close(self) -> None:
        """Refuse new requests, and end the unfinished ones with an error."""
        for client in self.clients:
            client.close()

    # -- the parts -----------------------------------------------------------------------------------------------

    def _taking(self) -> list[int]:
        """Clients that take requests, though some of them may wait for an engine."""
        return [number for number, client in enumerate(self.clients) if client.state is EngineState.READY]

    def _open(self) -> list[int]:
        return [number for number in self._running if self.clients[number].is_open]

    def _able(self) -> list[int]:
        return self._open() or self._taking()

    def _admit(self, requests: Sequence[EngineRequest], timeout: float) -> dict[int, list[EngineRequest]]:
        """Choose a client with room for each request.

        Raises:
            EngineUnavailableError: none takes requests.
            InvalidRequestError: one of the requests can never be served.
            QueueFullError: there is no room; the refusal of the first of the clients to have it again.
        """
        self.ready  # noqa: B018 (raises)
        able = self._able()
        refusals: list[ShoalError] = []
        while able:
            self._note_loads()
            shares: dict[int, list[EngineRequest]] = defaultdict(list)
            for request in requests:
                shares[self._route(request, able)].append(request)
            for number, share in shares.items():
                try:
                    self.clients[number].check_room(share, timeout)
                except QueueFullError as refusal:
                    refusals.append(refusal)
                    able.remove(number)
                    break
            else:
                return shares
        raise _soonest(refusals)

    def _note_loads(self) -> None:
        for number in self._running:
            self._routing.set_load(number, self.clients[number].load)

    def _route(self, request: EngineRequest, able: Sequence[int]) -> int:
        """One of these clients; one that has an engine, if any has."""
        without = [number for number in self._running if number not in able]
        if len(without) == len(self._running):
            return min(able, key=lambda number: self.clients[number].load)
        limits, hashes = next(iter(self._running.values())).limits, list[bytes]()
        if limits.enable_prefix_caching and may_skip(request.params):
            token_ids, size = request.prompt_token_ids, limits.block_size
            extend_hashes(hashes, len(token_ids) // size, token_ids, request.scheduling.cache_salt, size)
        return self._routing.route(hashes, without)

    def _take_change(self, number: int, ready: Ready | None) -> None:
        """A client has an engine, or none any more: what waits for one goes where there is one."""
        if self._running.pop(number, None) is not None:
            self._routing.leave(number)
        if ready is not None:
            self._running[number] = ready
            self._routing.join(number, ready.limits.num_blocks)
        for other, client in enumerate(self.clients):
            if other == number or other not in self._running:
                self._move(client)

    def _move(self, client: EngineClient) -> None:
        """Have what waits at a client go on at others that have engines, or may have if this one gave up."""
        gave_up = client.state is EngineState.STARTING
        able = self._open() or (self._taking() if gave_up else [])
        if not able or client.is_open:
            return
        self._note_loads()
        for request_id, submission in client.let_go(of_suspects=gave_up or client.is_retired).items():
            number = self._route(submission.journals[request_id].request, able)
            self.clients[number].adopt({request_id: submission})
            self._metrics.resumed(self.clients[number].name, 1)


def _any(checks: Iterable[Callable[[], None]]) -> None:
    """Raise what one of these checks raises, if none passes."""
    refusals: list[ShoalError] = []
    for check in checks:
        try:
            check()
        except (QueueFullError, EngineUnavailableError) as refusal:
            refusals.append(refusal)
        else:
            return
    raise _soonest(refusals)


def _soonest(refusals: Sequence[ShoalError]) -> ShoalError:
    """The first of those after which there is room again."""
    return min(refusals, key=lambda refusal: refusal.retry_after or inf)
