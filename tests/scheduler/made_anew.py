"""The policies with orders that are made anew in each step, of all requests: the oracle of orders that are kept."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable

from shoal.scheduler.config import Config, SchedulerConfig
from shoal.scheduler.output import FinishReason
from shoal.scheduler.policies.deadline import EarliestDeadlineFirst
from shoal.scheduler.policies.fair import VirtualTokenCounter
from shoal.scheduler.policies.fcfs import FirstComeFirstServed
from shoal.scheduler.policies.policy import KeyedPolicy, Policy
from shoal.scheduler.policies.priority import Priority
from shoal.scheduler.policies.sjf import ShortestJobFirst
from shoal.scheduler.policies.static import Static, StaticWithoutPadding
from shoal.scheduler.request import Request, RequestStatus


class MadeAnew(Policy):
    """Keeps the waiting requests in the order of arrival, the preempted ones before them, the latest first."""

    def __init__(self, config: SchedulerConfig, knobs: Config) -> None:
        super().__init__(config, knobs)
        self.queue: OrderedDict[Request, None] = OrderedDict()

    def order(self, running: Collection[Request], waiting: Collection[Request], now: float) -> Iterable[Request]:
        assert self.queue.keys() == set(waiting)
        return self.sort([*running, *self.queue], now)

    def sort(self, requests: list[Request], now: float) -> Iterable[Request]:
        return requests

    def on_arrival(self, request: Request) -> None:
        super().on_arrival(request)
        self.queue[request] = None

    def on_admission(self, request: Request) -> None:
        super().on_admission(request)
        del self.queue[request]

    def on_preemption(self, request: Request) -> None:
        super().on_preemption(request)
        self.queue[request] = None
        self.queue.move_to_end(request, last=False)

    def on_finish(self, request: Request, reason: FinishReason) -> None:
        super().on_finish(request, reason)
        self.queue.pop(request, None)


class KeyedAnew(MadeAnew, KeyedPolicy):
    def sort(self, requests: list[Request], now: float) -> Iterable[Request]:
        self._keys = {request: self.key(request) for request in requests}
        return sorted(requests, key=self.key)


class StaticAnew(MadeAnew, StaticWithoutPadding):
    def sort(self, requests: list[Request], now: float) -> Iterable[Request]:
        if not self._batch and self.queue and now >= self.wake_time(self.queue.keys(), now):
            self._batch = set(list(self.queue)[: self.config.max_num_seqs])
        return [request for request in requests if request in self._batch]


class FairAnew(MadeAnew, VirtualTokenCounter):
    def sort(self, requests: list[Request], now: float) -> Iterable[Request]:
        queues: defaultdict[str, deque[Request]] = defaultdict(deque)
        rows: Counter[str] = Counter()
        for request in requests:
            queues[request.scheduling.client].append(request)
            rows[request.scheduling.client] += request.status is RequestStatus.RUNNING
        least_served = None
        places = {name: place for place, name in enumerate(queues)}
        while queues:
            name = min(queues, key=lambda name: (self._clients[name].counter, rows[name], places[name]))
            request = queues[name].popleft()
            if not queues[name]:
                del queues[name]
            counter = self._clients[name].counter
            if least_served is None or counter <= least_served + self.knobs.fair_lead:
                yield request
                if least_served is None and request.status is RequestStatus.RUNNING:
                    least_served = self._clients[name].counter

    def _lift_level(self) -> None:
        counters = [client.counter for client in self._clients.values() if client.num_new]
        last = self._last_to_leave.counter if self._last_to_leave else 0.0
        self._level = max(self._level, min(counters, default=last))


def _anew(made: type[MadeAnew], kind: type[Policy]) -> type[Policy]:
    return type(f"{kind.__name__}Anew", (made, kind), {})


ANEW: dict[str, type[Policy]] = {
    "deadline": _anew(KeyedAnew, EarliestDeadlineFirst),
    "fair": FairAnew,
    "fcfs": _anew(MadeAnew, FirstComeFirstServed),
    "priority": _anew(KeyedAnew, Priority),
    "sjf": _anew(KeyedAnew, ShortestJobFirst),
    "static": _anew(StaticAnew, Static),
    "static-nopad": StaticAnew,
}
