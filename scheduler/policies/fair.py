"""Equal shares for clients: the virtual token counter."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace

from shoal.scheduler.config import PolicyConfig, SchedulerConfig
from shoal.scheduler.output import FinishReason
from shoal.scheduler.policies.policy import Policy
from shoal.scheduler.request import Request, RequestStatus

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
        lead: weighted tokens by which a client may be ahead of another in the batch before it has to sit out.

    The order is that of VTC (Sheng et al. 2024, "Fairness in Serving Large Language Models"), which acts at admission
    only; three things make it act in each step.  They matter to a client of few short requests, which else shares each
    of its steps with the many rows of others, and first waits for a row.

    - A client that was served by more than `lead` more than another one that has requests in the batch sits out: its
      running requests pause, and none of its waiting ones is admitted.  The less `lead`, the smaller are the steps.
    - A client that comes back after having nothing waiting is lifted to the level, the least counter among those that
      have, less twice `lead`: of what it missed it may catch up that much, half of it alone in the batch.  More credit
      idleness does not earn, and a new client earns none.
    - A waiting request takes the row, and then blocks, of the latest request of the client that was served most, if
      that one has at least twice as many rows as its own client has then, and was served more by what it has computed.
      So nobody can take a row back at once, and what is lost, if the prefix cache has not kept it, is no more than
      what was unequal.

    While two clients both have requests waiting, the service that they are given in any interval differs by at most

        2 * max(prompt_weight * L, output_weight * M)

    for prompts of at most L tokens, M the tokens that one batch's requests have in all when each is at its end, and
    `prompt_weight <= output_weight`.  What a preemption has computed again is nobody's service.

    Nobody starves: those who sit out wait for one that is served, until it has caught up or has no more to run; and a
    client's preempted request is its first to be admitted again.
    """

    def __init__(self, prompt_weight: float, output_weight: float, lead: float) -> None:
        self._prompt_weight = prompt_weight
        self._output_weight = output_weight
        self._lead = lead
        self._clients: dict[str, _Client] = {}
        self._level = 0.0
        self._last_to_leave: _Client | None = None
        self._least_served: float | None = None  # counter of the first client that has requests in this step
        self._max_clients = _MAX_IDLE_CLIENTS

    @classmethod
    def create(cls, limits: SchedulerConfig, config: PolicyConfig) -> VirtualTokenCounter:
        return cls(config.prompt_weight, config.output_weight, config.fair_lead)

    def order(self, requests: Collection[Request], now: float) -> Iterable[Request]:
        queues: defaultdict[str, deque[Request]] = defaultdict(deque)
        rows: Counter[str] = Counter()
        for request in requests:
            queues[request.scheduling.client].append(request)
            rows[request.scheduling.client] += request.status is RequestStatus.RUNNING
        # Of clients that were served alike, the one with fewer rows has better reason to ask for one.
        heap = [(self._clients[name].counter, rows[name], place, name) for place, name in enumerate(queues)]
        heapify(heap)
        self._least_served = None
        while heap:
            _, num_rows, place, name = heap[0]
            request = queues[name].popleft()
            yield request
            counter = self._clients[name].counter  # more, if the request was admitted
            if self._least_served is None and request.status is RequestStatus.RUNNING:
                self._least_served = counter
            if queues[name]:
                heapreplace(heap, (counter, num_rows, place, name))
            else:
                heappop(heap)

    def admits(self, request: Request, running: Collection[Request], now: float) -> bool:
        return not self._sits_out(request)

    def pauses(self, request: Request, now: float) -> bool:
        return self._sits_out(request)

    def victim(self, request: Request, running: Collection[Request], now: float) -> Request | None:
        if request.status is RequestStatus.RUNNING:
            most_served = self._most_served(running)
            return None if most_served is request else most_served
        rows = Counter(other.scheduling.client for other in running)
        enough = 2 * (rows[request.scheduling.client] + 1)
        others = [other for other in running if rows[other.scheduling.client] >= enough]
        if not others:
            return None
        victim = self._most_served(others)
        lost = self._prompt_weight * victim.num_computed_tokens
        return victim if self._client(request).counter + lost <= self._client(victim).counter else None

    def on_arrival(self, request: Request) -> None:
        self._lift_level()
        if len(self._clients) > self._max_clients:
            self._forget()
        client = self._clients.get(request.scheduling.client)
        if client is None:
            client = self._clients[request.scheduling.client] = _Client(self._level)
        elif not client.num_waiting:
            client.counter = max(client.counter, self._level - 2 * self._lead)
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

    def _sits_out(self, request: Request) -> bool:
        """Whether the request's client is too far ahead of the first that has requests in this step."""
        return self._least_served is not None and self._client(request).counter > self._least_served + self._lead

    def _most_served(self, running: Collection[Request]) -> Request:
        """The latest request of the client that was served most."""
        return max(reversed(tuple(running)), key=lambda request: self._client(request).counter)

    def _lift_level(self) -> None:
        """Bring the level up to the least counter of those who wait, or that of whoever waited last.

        It never sinks, not even for those who catch up, or they would take newcomers down with them.
        """
        waiting = [client.counter for client in self._clients.values() if client.num_waiting]
        last = self._last_to_leave.counter if self._last_to_leave else 0.0
        self._level = max(self._level, min(waiting, default=last))

    def _forget(self) -> None:
        """Forget clients without requests that are not above the level: they come back as new ones."""
        self._clients = {
            name: client
            for name, client in self._clients.items()
            if client.num_unfinished or client.counter > self._level
        }
        self._max_clients = 2 * len(self._clients) + _MAX_IDLE_CLIENTS
