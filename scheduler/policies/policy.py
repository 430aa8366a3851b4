"""What a scheduling policy answers, and what it is told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable

from shoal.scheduler.config import PolicyConfig, SchedulerConfig
from shoal.scheduler.output import FinishReason
from shoal.scheduler.request import Request, RequestStatus


class Notices:
    """What a policy is told, for those that count or learn."""

    def on_arrival(self, request: Request) -> None:
        """The request begins to wait."""

    def on_admission(self, request: Request) -> None:
        """The request joins the batch, for the first time or after a preemption."""

    def on_progress(self, request: Request, num_tokens: int) -> None:
        """The request was given so many output tokens, which it counts already."""

    def on_finish(self, request: Request, reason: FinishReason) -> None:
        """The request has ended, wherever it was."""


class Policy(Notices, ABC):
    """Orders requests, says who may be admitted and who sits out a step, and names the victim.

    It answers and never acts: token budget, blocks and preemption belong to the scheduler.
    """

    @classmethod
    def create(cls, limits: SchedulerConfig, config: PolicyConfig) -> Policy:
        """Make one with its knobs out of the configuration."""
        return cls()

    @abstractmethod
    def order(self, requests: Collection[Request], now: float) -> Iterable[Request]:
        """All requests, first to be served first; read lazily, so that an iterator sees the admissions before it.

        They come with those that run first, in the order of admission, and then those that wait, in the order of
        arrival but preempted ones first.
        """

    def admits(self, request: Request, running: Collection[Request], now: float) -> bool:
        """Whether this waiting request may join the batch now; if not, the next that waits is asked about."""
        return True

    def pauses(self, request: Request, now: float) -> bool:
        """Whether this running request sits out the step in the making: it keeps row and blocks, and gets no share.

        Asked when its turn comes in `order`.  If all that run sat out, the scheduler would serve one nevertheless.
        """
        return False

    @abstractmethod
    def victim(self, request: Request, running: Collection[Request], now: float) -> Request | None:
        """Which running request to preempt so that `request` gets blocks or, if it waits and the batch is full, a row.

        None if `request` itself must give way.  `running` is not empty.  Who waits may only take from somebody who
        could not take it back, or the two would preempt each other for ever.
        """

    def wake_time(self, now: float) -> float:
        """While requests wait and none runs: when one of them may be admitted, if nothing happens before."""
        return now

    def pads(self, request: Request) -> bool:
        """Whether the row of this request, which has ended, is computed on; asked again whenever a request ends."""
        return False


class KeyedPolicy(Policy):
    """Serves the least key first; the greatest gives way, to a waiting request too if that one's key is less.

    Among equals the first comes first.
    """

    def __init__(self) -> None:
        self._waiting_keys: dict[Request, float] = {}

    @abstractmethod
    def key(self, request: Request) -> float:
        """Must not change while the request waits: a long queue is put in order in every step."""

    def order(self, requests: Collection[Request], now: float) -> Iterable[Request]:
        known = self._waiting_keys
        for request in requests:
            if request not in known and request.status is not RequestStatus.RUNNING:
                known[request] = self.key(request)
        return sorted(requests, key=lambda request: known[request] if request in known else self.key(request))

    def on_admission(self, request: Request) -> None:
        self._waiting_keys.pop(request, None)

    def on_finish(self, request: Request, reason: FinishReason) -> None:
        self._waiting_keys.pop(request, None)

    def victim(self, request: Request, running: Collection[Request], now: float) -> Request | None:
        last = self.last(running)
        if request.status is RequestStatus.RUNNING:
            return None if last is request else last
        return last if self.key(request) < self.key(last) else None

    def last(self, running: Collection[Request]) -> Request:
        """The running request with the greatest key; of equals the one admitted last."""
        return max(reversed(tuple(running)), key=self.key)
