"""Equal shares for clients: the virtual token counter."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace

from shoal.scheduler.config import Config, SchedulerConfig, setting
from shoal.scheduler.output import FinishReason
from shoal.scheduler.policies.policy import Policy
from shoal.scheduler.request import Request, RequestStatus

_MAX_IDLE_CLIENTS = 1024  # remembered before those that may be forgotten are looked for


@dataclass(slots=True)
class _Client:
    """What is known of a client.

    Attributes:
        counter: the service that the client was given, in weighted tokens.
        num_waiting: its requests that were never admitted.
        num_unfinished: its requests, those included.
    """

    counter: float = 0.0
    num_waiting: int = 0
    num_unfinished: int = 0


class VirtualTokenCounter(Policy):
    """The client that was served least goes first; among a client's own requests the first comes first.

    The service of a client is counted in weighted tokens: `prompt_weight` for each token of a prompt, when the prompt
    is admitted, and `output_weight` for each output token.

    The order is that of VTC (Sheng et al. 2024, "Fairness in Serving Large Language Models"), which acts at admission
    only.  Three rules make it act in each step.  They help a client with few short requests: without them it would
    share each of its steps with the many rows of other clients, after it has waited for a row.

    - A client pauses if its service exceeds that of another client in the batch by more than `fair_lead`: its running
      requests get no share of the step, and none of its waiting ones is admitted.  The less `fair_lead`, the smaller
      are the steps.
    - The level is the least counter among the clients with waiting requests.  A client that had nothing waiting and
      comes back is lifted to the level less twice `fair_lead`.  So it may catch up on that much of the service that it
      missed, half of it alone in the batch.  Idleness earns no more credit, and a new client has none.
    - A waiting request takes the row, and then blocks, of the latest request of the client that was served most.  That
      client must have at least twice as many rows as the waiting request's client will have, and must have been served
      more by at least what its request has computed.  So a row cannot be taken back at once, and what is lost, if the
      prefix cache has not kept it, is no more than what was unequal.

    While two clients both have requests waiting, the service that they are given in any interval differs by at most

        2 * max(prompt_weight * L, output_weight * M)

    for prompts of at most L tokens, M the tokens that one batch's requests have in all when each is at its end, and
    `prompt_weight <= output_weight`.  What is computed again after a preemption counts for no client.

    No client starves: a client that pauses waits for one that is served, until that one has caught up or has nothing
    left to run.  A client's preempted request is its first to be admitted again.
    """

    name = "fair"

    @dataclass(frozen=True, kw_only=True)
    class Knobs(Config):
        prompt_weight: float = setting(1.0, above=0, help="For fair: service that a token of a prompt counts as.")
        output_weight: float = setting(2.0, above=0, help="For fair: service that an output token counts as.")
        fair_lead: float = setting(
            256.0,
            above=0,
            help="For fair: service by which a client may be ahead of another one in the batch before it pauses.  A"
            " client that comes back may catch up on twice as much of the service that it missed.",
        )

    knobs: Knobs

    def __init__(self, config: SchedulerConfig, knobs: Knobs) -> None:
        super().__init__(config, knobs)
        self._clients: dict[str, _Client] = {}
        self._level = 0.0
        self._last_to_leave: _Client | None = None
        self._least_served: float | None = None  # counter of the first client that has requests in this step
        self._max_clients = _MAX_IDLE_CLIENTS

    def order(self, requests: Collection[Request], now: float) -> Iterable[Request]:
        queues: defaultdict[str, deque[Request]] = defaultdict(deque)
        rows: Counter[str] = Counter()
        for request in requests:
            queues[request.scheduling.client].append(request)
            rows[request.scheduling.client] += request.status is RequestStatus.RUNNING
        # Of clients that were served alike, the one with fewer rows comes first.
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
        return not self._is_ahead(request)

    def pauses(self, request: Request, now: float) -> bool:
        return self._is_ahead(request)

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
        lost = self.knobs.prompt_weight * victim.num_computed_tokens
        return victim if self._client(request).counter + lost <= self._client(victim).counter else None

    def on_arrival(self, request: Request) -> None:
        self._lift_level()
        if len(self._clients) > self._max_clients:
            self._forget()
        client = self._clients.get(request.scheduling.client)
        if client is None:
            client = self._clients[request.scheduling.client] = _Client(self._level)
        elif not client.num_waiting:
            client.counter = max(client.counter, self._level - 2 * self.knobs.fair_lead)
        client.num_waiting += 1
        client.num_unfinished += 1

    def on_admission(self, request: Request) -> None:
        if not request.num_preemptions:
            client = self._client(request)
            client.counter += self.knobs.prompt_weight * request.num_prompt_tokens
            self._leave(client)

    def on_progress(self, request: Request, num_tokens: int) -> None:
        self._client(request).counter += self.knobs.output_weight * num_tokens

    def on_finish(self, request: Request, reason: FinishReason) -> None:
        client = self._client(request)
        client.num_unfinished -= 1
        if request.scheduled_time is None:
            self._leave(client)

    def _client(self, request: Request) -> _Client:
        return self._clients[request.scheduling.client]

    def _leave(self, client: _Client) -> None:
        """One of the client's requests has been admitted, or has ended before."""
        client.num_waiting -= 1
        if not client.num_waiting:
            self._last_to_leave = client

    def _is_ahead(self, request: Request) -> bool:
        """Whether the request's client is too far ahead of the first that has requests in this step."""
        return (
            self._least_served is not None and self._client(request).counter > self._least_served + self.knobs.fair_lead
        )

    def _most_served(self, running: Collection[Request]) -> Request:
        """The latest request of the client that was served most."""
        return max(reversed(tuple(running)), key=lambda request: self._client(request).counter)

    def _lift_level(self) -> None:
        """Raise the level to the least counter of the clients with waiting requests.

        If there are none, it is the counter of the client that had one last.  The level never sinks: a client that
        catches up would take new clients down with it.
        """
        waiting = [client.counter for client in self._clients.values() if client.num_waiting]
        last = self._last_to_leave.counter if self._last_to_leave else 0.0
        self._level = max(self._level, min(waiting, default=last))

    def _forget(self) -> None:
        """Forget clients that have no requests and are not above the level: they come back as new ones."""
        self._clients = {
            name: client
            for name, client in self._clients.items()
            if client.num_unfinished or client.counter > self._level
        }
        self._max_clients = 2 * len(self._clients) + _MAX_IDLE_CLIENTS
