"""What a scheduling policy answers, and what it is told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
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

    def on_preemption(self, request: Request) -> None:
        """The request begins to wait again.  This is told at the end of the step's scheduling."""

    def on_progress(self, request: Request, num_tokens: int) -> None:
        """The request was given `num_tokens` output tokens; `request.num_output_tokens` counts them already."""

    def on_finish(self, request: Request, reason: FinishReason) -> None:
        """The request has ended, whether it ran or waited."""


class Policy(Notices, ABC):
    """Orders requests, leaves out those that do without a share, and names the victim of a preemption.

    It answers and never acts: token budget, blocks, rows and preemption belong to the scheduler.

    Attributes:
        name: what the settings call the policy.  A class that defines no name of its own cannot be chosen there.
        Knobs: the type of `knobs`: the policy's own settings, each declared with `setting`.  Their names must differ
            from those of all other policies.
        is_steady: whether a step that only decodes is followed by others until a request comes, ends or lacks blocks.
        config: the scheduler's limits.
    """

    name: ClassVar[str]
    is_steady: ClassVar[bool] = True
    Knobs: ClassVar[type[Config]] = Config
    knobs: Config

    def __init__(self, config: SchedulerConfig, knobs: Config) -> None:
        assert isinstance(knobs, self.Knobs), "these are the knobs of another policy"
        self.config = config
        self.knobs = knobs

    def key(self, request: Request) -> float:
        """The place in `WaitingQueue` of a request that begins to wait, the least first; it is asked for once."""
        return 0.0

    @abstractmethod
    def order(self, running: Collection[Request], waiting: Collection[Request], now: float) -> Iterable[Request]:
        """The requests of the step, the first to be served first.

        A request that is left out gets no share: a running one pauses and keeps its row and blocks, a waiting one is
        not admitted.  If all running requests paused, the scheduler would serve one of them nevertheless.

        The result is read lazily, so that an iterator sees the admissions of the requests before the next one.  After
        a waiting request that was not admitted no other one is, and what comes of `waiting` is passed over: an iterator
        that ends there does not walk through a long queue.

        Args:
            running: in the order of admission.
            waiting: in the order of `key`.
        """

    @abstractmethod
    def victim(self, request: Request, running: Collection[Request], now: float) -> Request | None:
        """The running request to preempt so that `request` gets blocks or, if it waits and the batch is full, a row.

        None means that `request` itself must give way.  `running` is not empty.  A waiting request may only take from
        a request that could not take the same back, or the two would preempt each other for ever.
        """

    def wake_time(self, waiting: Collection[Request], now: float) -> float:
        """While requests wait and none runs: when one of them may be admitted, if nothing happens before."""
        return now

    def pads(self, request: Request) -> bool:
        """Whether the row of this request, which has ended, is computed on.  Asked again whenever a request ends."""
        return False


class KeyedPolicy(Policy):
    """Serves the request with the least key first; the one with the greatest gives way.

    It gives way to a waiting request too, if that one's key is less.  Among equal keys the first request comes first.
    `victim` compares the keys that `order` asked for: who overrides `order` overrides both.
    """

    _keys: dict[Request, float]  # of those in the order of this step, each asked for once

    @abstractmethod
    def key(self, request: Request) -> float:
        """The request's place in the order.  It must not change while the request waits."""

    def order(self, running: Collection[Request], waiting: Collection[Request], now: float) -> Iterable[Request]:
        keys = self._keys = {request: self.key(request) for request in running}
        ordered = sorted(keys, key=keys.__getitem__)
        start = 0
        for request in waiting:
            keys[request] = self.key(request)
            end = bisect_right(ordered, keys[request], key=keys.__getitem__)
            yield from ordered[start:end]
            start = end
            yield request
            if request.status is not RequestStatus.RUNNING:
                break
        yield from ordered[start:]

    def victim(self, request: Request, running: Collection[Request], now: float) -> Request | None:
        last = max(reversed(tuple(running)), key=self._keys.__getitem__)  # of equals the one that was admitted last
        if request.status is RequestStatus.RUNNING:
            return None if last is request else last
        return last if self._keys[request] < self._keys[last] else None
