"""The requests that wait, in the order of their keys."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping
from itertools import count

from shoal.scheduler.request import Request, RequestStatus


class WaitingQueue(Mapping[str, Request]):
    """Waiting requests by id, the one with the least key first.

    Among equal keys the preempted requests come first, the latest preemption before the others; the rest follow in the
    order of arrival.  Each request is put in its place once, by bisection, so that no step sorts a long queue.  While
    the queue is read, the request that was read last may leave it.

    Args:
        key: called when a request is added.
    """

    def __init__(self, key: Callable[[Request], float]) -> None:
        self._key = key
        self._places: dict[str, tuple[float, int, Request]] = {}
        self._sorted: list[tuple[float, int, Request]] = []
        self._numbers = count(1)

    def add(self, request: Request) -> None:
        number = next(self._numbers)
        place = self._key(request), -number if request.status is RequestStatus.PREEMPTED else number, request
        self._places[request.request_id] = place
        insort(self._sorted, place)

    def discard(self, request_id: str) -> None:
        """Take a request out, if it is there."""
        if place := self._places.pop(request_id, None):
            del self._sorted[bisect_left(self._sorted, place)]

    def __getitem__(self, request_id: str) -> Request:
        return self._places[request_id][2]

    def __iter__(self) -> Iterator[str]:
        index = 0
        while index < len(self._sorted):
            place = self._sorted[index]
            yield place[2].request_id
            index += self._sorted[index : index + 1] == [place]

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._places

    def __len__(self) -> int:
        return len(self._sorted)
