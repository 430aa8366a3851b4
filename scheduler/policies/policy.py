"""What a scheduling policy answers, and what it is told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from typing import ClassVar

from shoal.scheduler.config import Config, SchedulerConfig
from shoal.scheduler.output import FinishReason
from shoal.scheduler.request import Request, RequestStatus


class Notices:
    """What a policy is told, for those that count or learn."""

    def on_arrival(self, request: Request) -> None:
        """The request begins to wait."""

    def on_admission(self, request: Request) -> None:
        """The request joins the batch, for the first time or after a preemption."""

    def on_progress(self, request: Request, num_tokens: int) -> None:
        """The request was given `num_tokens` output tokens; `request.num_output_tokens` counts them already."""

    def on_finish(self, request: Request, reason: FinishReason) -> None:
        """The request has ended, whether it ran or waited."""


class Policy(Notices, ABC):
    """Orders requests, says which are admitted and which pause for a step, and names the victim of a preemption.

    It answers and never acts: token budget, blocks, rows and preemption belong to the scheduler.

    Attributes:
        name: what the settings call the policy.  A class that defines no name of its own cannot be chosen there.
        Knobs: the type of `knobs`: the policy's own settings, each declared with `setting`.  Their names must differ
            from those of all other policies.
        config: the scheduler's limits.
    """

    name: ClassVar[str]
    Knobs: ClassVar[type[Config]] = Config
    knobs: Config

    def __init__(self, config: SchedulerConfig, knobs: Config) -> None:
        assert isinstance(knobs, self.Knobs), "these are the knobs of another policy"
        self.config = config
        self.knobs = knobs

    @abstractmethod
    def order(self, requests: Collection[Request], now: float) -> Iterable[Request]:
        """All requests, the first to be served first.

        The result is read lazily, so that an iterator sees the admissions of the requests before the next one.
        `requests` holds the running ones first, in the order of admission, and then the waiting ones, in the order of
        arrival but preempted ones first.
        """

    def admits(self, request: Request, running: Collection[Request], now: float) -> bool:
        """Whether this waiting request may join the batch now.  If not, the next waiting request is asked about."""
        return True

    def pauses(self, request: Request, now: float) -> bool:
        """Whether this running request pauses for this step: it keeps its row and its blocks, and gets no share.

        The question is asked when the request's turn comes in `order`.  If all running requests paused, the scheduler
        would serve one of them nevertheless.
        """
        return False

    @abstractmethod
    def victim(self, request: Request, running: Collection[Request], now: float) -> Request | None:
        """The running request to preempt so that `request` gets blocks or, if it waits and the batch is full, a row.

        None means that `request` itself must give way.  `running` is not empty.  A waiting request may only take from
        a request that could not take the same back, or the two would preempt each other for ever.
        """

    def wake_time(self, now: float) -> float:
        """While requests wait and none runs: when one of them may be admitted, if nothing happens before."""
        return now

    def pads(self, request: Request) -> bool:
        """Whether the row of this request, which has ended, is computed on.  Asked again whenever a request ends."""
        return False


class KeyedPolicy(Policy):
    """Serves the request with the least key first; the one with the greatest gives way.

    It gives way to a waiting request too, if that one's key is less.  Among equal keys the first request comes first.
    """

    def __init__(self, config: SchedulerConfig, knobs: Config) -> None:
        super().__init__(config, knobs)
        self._waiting_keys: dict[Request, float] = {}

    @abstractmethod
    def key(self, request: Request) -> float:
        """The request's place in the order.  It must not change while the request waits: it is computed once."""

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
        last = max(reversed(tuple(running)), key=self.key)  # of equals the one that was admitted last
        if request.status is RequestStatus.RUNNING:
            return None if last is request else last
        return last if self.key(request) < self.key(last) else None
