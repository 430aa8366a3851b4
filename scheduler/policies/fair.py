"""Equal shares for clients: the virtual token counter."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace

from scheduler.config import PolicyConfig, SchedulerConfig
from scheduler.output import FinishReason
from scheduler.policies.policy import Policy
from scheduler.request import Request, RequestStatus

_MAX_IDLE_CLIENTS = 1024  # that are remembered before it is looked which of them may be forgotten


@dataclass(slots=True)
class _Client:
    """What is known of a client.

    Attributes:
        counter: the service that it was given, in weighted tokens.
        num_waiting: its requests that were never admitted.
        num_unfinished: its requests, those included.
    """

    counter: float = 0.0
    num_waiting: int = 0
    num_unfinished: int = 0


class VirtualTokenCounter(Policy):
    """The client that was served least goes first; among a client's own requests the first comes first.

    Args:
        prompt_weight, output_weight: what a token counts as service; a prompt counts when it is admitted.

    The algorithm is VTC of Sheng et al. 2024, "Fairness in Serving Large Language Models".  A client that comes back
    after having nothing waiting is lifted to the least counter among those that have: idleness earns no credit.  It is
    work-conserving: whoever waits may use what nobody else asks for.  While two clients both have requests waiting,
    the service that they are given in any interval differs by at most

        2 * max(prompt_weight * L, output_weight * M)

    for prompts of at most L tokens, M the tokens that one batch's requests have in all when each is at its end, and
    `prompt_weight <= output_weight`.  What a preemption has computed again is nobody's service.  Running requests give
    way for blocks only, those of the client that was served most first.
    """

    def __init__(self, prompt_weight: float, output_weight: float) -> None:
        self._prompt_weight = prompt_weight
        self._output_weight = output_weight
        self._clients: dict[str, _Client] = {}
        self._last_to_leave: _Client | None = None
        self._max_clients = _MAX_IDLE_CLIENTS

    @classmethod
    def create(cls, limits: SchedulerConfig, config: PolicyConfig) -> VirtualTokenCounter:
        return cls(config.prompt_weight, config.output_weight)

    def order(self, requests: Collection[Request], now: float) -> Iterable[Request]:
        queues: defaultdict[str, deque[Request]] = defaultdict(deque)
        for request in requests:
            queues[request.scheduling.client].append(request)
        heap = [(self._clients[name].counter, place, name) for place, name in enumerate(queues)]
        heapify(heap)
        while heap:
            _, place, name = heap[0]
            yield queues[name].popleft()
            if queues[name]:
                heapreplace(heap, (self._clients[name].counter, place, name))  # more, if the request was admitted
            else:
                heappop(heap)

    def victim(self, request: Request, running: Collection[Request], now: float) -> Request | None:
        if request.status is not RequestStatus.RUNNING:
            return None
        most_served = max(reversed(tuple(running)), key=lambda other: self._client(other).counter)
        return None if most_served is request else most_served

    def on_arrival(self, request: Request) -> None:
        level = self._level()
        if len(self._clients) > self._max_clients:
            self._forget(level)
        client = self._clients.setdefault(request.scheduling.client, _Client())
        if not client.num_waiting:
            client.counter = max(client.counter, level)
        client.num_waiting += 1
        client.num_unfinished += 1

    def on_admission(self, request: Request) -> None:
        if not request.num_preemptions:
            client = self._client(request)
            client.counter += self._prompt_weight * request.num_prompt_tokens
            self._leave(client)

    def on_progress(self, request: Request, num_tokens: int) -> None:
        self._client(request).counter += self._output_weight * num_tokens

    def on_finish(self, request: Request, reason: FinishReason) -> None:
        client = self._client(request)
        client.num_unfinished -= 1
        if request.scheduled_time is None:
            self._leave(client)

    def _client(self, request: Request) -> _Client:
        return self._clients[request.scheduling.client]

    def _leave(self, client: _Client) -> None:
        """One of the client's requests waits no more."""
        client.num_waiting -= 1
        if not client.num_waiting:
            self._last_to_leave = client

    def _level(self) -> float:
        """The counter below which nobody comes back: the least of those who wait, or of whoever waited last."""
        waiting = [client.counter for client in self._clients.values() if client.num_waiting]
        return min(waiting, default=self._last_to_leave.counter if self._last_to_leave else 0.0)

    def _forget(self, level: float) -> None:
        """Forget clients without requests who would come back with `level` anyway."""
        self._clients = {
            name: client for name, client in self._clients.items() if client.num_unfinished or client.counter > level
        }
        self._max_clients = 2 * len(self._clients) + _MAX_IDLE_CLIENTS
