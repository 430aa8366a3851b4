"""Static batches: the baseline that continuous batching is measured against."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

from shoal.scheduler.config import PolicyConfig, SchedulerConfig
from shoal.scheduler.output import FinishReason
from shoal.scheduler.policies.fcfs import FirstComeFirstServed
from shoal.scheduler.request import Request


class StaticWithoutPadding(FirstComeFirstServed):
    """A batch is formed, and nobody joins until all of it has finished; its rows end with their requests.

    Args:
        max_num_seqs: the scheduler's; when so many wait, a batch is formed.
        timeout_seconds: it is formed of fewer when one of them has waited so long.

    The strongest form of the baseline.  The members of a batch join over several steps if their prompts exceed the
    token budget, and one that is preempted stays a member.
    """

    def __init__(self, max_num_seqs: int, timeout_seconds: float) -> None:
        self._max_num_seqs = max_num_seqs
        self._timeout_seconds = timeout_seconds
        self._waiting: dict[Request, None] = {}
        self._batch: set[Request] = set()

    @classmethod
    def create(cls, limits: SchedulerConfig, config: PolicyConfig) -> StaticWithoutPadding:
        return cls(limits.max_num_seqs, config.static_timeout_seconds)

    def admits(self, request: Request, running: Collection[Request], now: float) -> bool:
        if not self._batch and (len(self._waiting) >= self._max_num_seqs or now >= self.wake_time(now)):
            self._batch = set(islice(self._waiting, self._max_num_seqs))
            for member in self._batch:
                del self._waiting[member]
        return request in self._batch

    def wake_time(self, now: float) -> float:
        if self._batch or len(self._waiting) >= self._max_num_seqs:
            return now
        return next(iter(self._waiting)).arrival_time + self._timeout_seconds

    def on_arrival(self, request: Request) -> None:
        self._waiting[request] = None

    def on_finish(self, request: Request, reason: FinishReason) -> None:
        self._batch.discard(request)
        self._waiting.pop(request, None)


class Static(StaticWithoutPadding):
    """A batch is formed, and all its rows are computed until the longest has finished, as padded inference does.

    The field's usual baseline.  A request that has ended is answered at once; its row goes on for nothing.  Outputs are
    padded so, prompts are not: that would need blocks and attention over tokens which nobody has, and flatters us.
    """

    def pads(self, request: Request) -> bool:
        return bool(self._batch)
