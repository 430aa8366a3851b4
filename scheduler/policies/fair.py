"""Equal shares for clients: the virtual token counter."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from itertools import count

from shoal.scheduler.config import Config, SchedulerConfig, setting
from shoal.scheduler.output import FinishReason
from shoal.scheduler.policies.policy import Policy
from shoal.scheduler.request import Request, RequestStatus

_MAX_IDLE_CLIENTS = 1024  # remembered before those that may be forgotten are looked for


@dataclass(slots=True, eq=False)
class _Client:
    """What is known of a client.

    Attributes:
        counter: the service that the client was given, in weighted tokens; it never sinks.
        waiting: its waiting requests, the first to be admitted first, each with a number that grows in that order
            over all clients.
        num_new: of them, those that were never admitted.
        num_rows: its running requests.
        turn: its place among the clients that wait and have no rows; None if it is not one of them.
        has_level: whether it is among those of which the level may be the least counter.
    """

    counter: float
    waiting: OrderedDict[Request, int] = field(default_factory=OrderedDict)
    num_new: int = 0
    num_rows: int = 0
    turn: _Turn | None = None
    has_level: bool = False


_Turn = tuple[float, int, int, _Client]  # counter, rows, and a number that decides between clients with the same


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
    is_steady = False

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
        self._numbers = count(1)
        self._without_rows: list[_Turn] = []  # of the clients that wait and have no rows, sorted
        self._levels: list[tuple[float, int, _Client]] = []  # a heap; its counters lag behind
        self._level = 0.0
        self._last_to_leave: _Client | None = None
        self._max_clients = _MAX_IDLE_CLIENTS

    def order(self, running: Collection[Request], waiting: Collection[Request], now: float) -> Iterable[Request]:
        rows: dict[_Client, list[Request]] = {}
        for request in running:
            rows.setdefault(self._client(request), []).append(request)
        turns = sorted((client.counter, len(own), place, client) for place, (client, own) in enumerate(rows.items()))
        least_served: float | None = None  # counter of the first client that has requests in this step
        admits = True
        while True:
            if admits and self._without_rows and not (turns and turns[0] < self._without_rows[0]):
                insort(turns, self._without_rows[0])
            if not turns:
                return
            counter, num_rows, place, client = turns[0]
            if least_served is not None and counter > least_served + self.knobs.fair_lead:
                return  # those who follow are as far ahead
            for request in rows.pop(client, ()):
                yield request
                if least_served is None and request.status is RequestStatus.RUNNING:
                    least_served = counter
            del turns[0]
            if admits and client.waiting:
                request = next(iter(client.waiting))
                yield request
                admits = request.status is RequestStatus.RUNNING
                if admits:
                    insort(turns, (client.counter, num_rows, place, client))
                    if least_served is None:
                        least_served = client.counter

    def victim(self, request: Request, running: Collection[Request], now: float) -> Request | None:
        if request.status is RequestStatus.RUNNING:
            most_served = self._most_served(running)
            return None if most_served is request else most_served
        clients = [other.scheduling.client for other in running]
        rows = Counter(clients)
        enough = 2 * (rows[request.scheduling.client] + 1)
        others = [other for other, client in zip(running, clients, strict=True) if rows[client] >= enough]
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
        elif not client.num_new:
            client.counter = max(client.counter, self._level - 2 * self.knobs.fair_lead)
        number = client.waiting[request] = next(self._numbers)
        client.num_new += 1
        if not client.has_level:
            client.has_level = True
            heappush(self._levels, (client.counter, number, client))
        self._line_up(client)

    def on_admission(self, request: Request) -> None:
        client = self._client(request)
        del client.waiting[request]
        client.num_rows += 1
        if not request.num_preemptions:
            client.counter += self.knobs.prompt_weight * request.num_prompt_tokens
            self._leave(client)
        self._line_up(client)

    def on_preemption(self, request: Request) -> None:
        client = self._client(request)
        client.num_rows -= 1
        client.waiting[request] = -next(self._numbers)
        client.waiting.move_to_end(request, last=False)
        self._line_up(client)

    def on_progress(self, request: Request, num_tokens: int) -> None:
        self._client(request).counter += self.knobs.output_weight * num_tokens

    def on_finish(self, request: Request, reason: FinishReason) -> None:
        client = self._client(request)
        if client.waiting.pop(request, None) is None:
            client.num_rows -= 1
        if request.scheduled_time is None:
            self._leave(client)
        self._line_up(client)

    def _client(self, request: Request) -> _Client:
        return self._clients[request.scheduling.client]

    def _leave(self, client: _Client) -> None:
        """One of the client's requests has been admitted, or has ended before."""
        client.num_new -= 1
        if not client.num_new:
            self._last_to_leave = client

    def _line_up(self, client: _Client) -> None:
        """Give a client that waits without rows its turn; take it from one that no longer does."""
        turn: _Turn | None = None
        if client.waiting and not client.num_rows:
            turn = client.counter, 0, next(iter(client.waiting.values())), client
        if turn != client.turn:
            if client.turn is not None:
                del self._without_rows[bisect_left(self._without_rows, client.turn)]
            if turn is not None:
                insort(self._without_rows, turn)
            client.turn = turn

    def _most_served(self, running: Collection[Request]) -> Request:
        """The latest request of the client that was served most."""
        return max(reversed(tuple(running)), key=lambda request: self._client(request).counter)

    def _lift_level(self) -> None:
        """Raise the level to the least counter of the clients with requests that were never admitted.

        If there are none, it is the counter of the client that had one last.  The level never sinks: a client that
        catches up would take new clients down with it.
        """
        levels = self._levels
        while levels:
            counter, number, client = levels[0]
            if not client.num_new:
                client.has_level = False
                heappop(levels)
            elif client.counter > counter:
                heapreplace(levels, (client.counter, number, client))
            else:
                break
        last = self._last_to_leave.counter if self._last_to_leave else 0.0
        self._level = max(self._level, levels[0][0] if levels else last)

    def _forget(self) -> None:
        """Forget clients that have no requests and are not above the level: they come back as new ones."""
        self._clients = {
            name: client
            for name, client in self._clients.items()
            if client.waiting or client.num_rows or client.counter > self._level
        }
        self._max_clients = 2 * len(self._clients) + _MAX_IDLE_CLIENTS
