"""Static batches: the baseline that continuous batching is measured against."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import chain, islice, takewhile

from shoal.scheduler.config import Config, SchedulerConfig, setting
from shoal.scheduler.output import FinishReason
from shoal.scheduler.policies.fcfs import FirstComeFirstServed
from shoal.scheduler.request import Request


class StaticWithoutPadding(FirstComeFirstServed):
    """A batch is formed, and nobody joins until all of it has finished; its rows end with their requests.

    A batch is formed when `max_num_seqs` requests wait, or when one of fewer has waited `static_timeout_seconds`.
    This is the strongest form of the baseline.  The members of a batch join over several steps if their prompts exceed
    the token budget, and one that is preempted stays a member.
    """

    name = "static-nopad"

    @dataclass(frozen=True, kw_only=True)
    class Knobs(Config):
        static_timeout_seconds: float = setting(
            0.1,
            above=0,
            at_most=3600,
            help="For static and static-nopad: longest time that a request waits for a batch to become full.",
        )

    knobs: Knobs

    def __init__(self, config: SchedulerConfig, knobs: Knobs) -> None:
        super().__init__(config, knobs)
        self._batch: set[Request] = set()

    def order(self, running: Collection[Request], waiting: Collection[Request], now: float) -> Iterable[Request]:
        if not self._batch and waiting and now >= self.wake_time(waiting, now):
            self._batch = set(islice(waiting, self.config.max_num_seqs))
        return chain(running, takewhile(self._batch.__contains__, waiting))  # preempted members wait before all others

    def wake_time(self, waiting: Collection[Request], now: float) -> float:
        if self._batch or len(waiting) >= self.config.max_num_seqs:
            return now
        return next(iter(waiting)).arrival_time + self.knobs.static_timeout_seconds

    def on_finish(self, request: Request, reason: FinishReason) -> None:
        self._batch.discard(request)


class Static(StaticWithoutPadding):
    """A batch is formed, and all its rows are computed until the longest has finished, as padded inference does.

    This is the field's usual baseline.  A request that has ended is answered at once; its row is computed on in vain.
    Only outputs are padded: padding prompts would need blocks for tokens that no request has, so this is the faster
    form.
    """

    name = "static"

    def pads(self, request: Request) -> bool:
        return bool(self._batch)
