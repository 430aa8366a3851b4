"""Earliest deadline first."""

from __future__ import annotations

from collections.abc import Collection

from shoal.scheduler.config import PolicyConfig, SchedulerConfig
from shoal.scheduler.policies.policy import KeyedPolicy
from shoal.scheduler.request import Request, RequestStatus


class EarliestDeadlineFirst(KeyedPolicy):
    """The request whose next token is due first goes first; the one with the most slack gives way.

    Args:
        ttft_slo_ms, tpot_slo_ms: the objectives of requests that name none.

    The first token is due `ttft_slo_ms` after arrival, and each further one `tpot_slo_ms` after the one before was due
    (Liu and Layland 1973).  What a token costs is much the same for all, so that the earliest deadline is the least
    slack.  Nothing is dropped: who is late goes first.  Who waits for a row never takes one, for tokens that come ahead
    of time are no reason to compute them again.  Nobody starves: a request is not overtaken by any that arrives after
    its deadline.
    """

    def __init__(self, ttft_slo_ms: float, tpot_slo_ms: float) -> None:
        super().__init__()
        self._ttft_slo_ms = ttft_slo_ms
        self._tpot_slo_ms = tpot_slo_ms

    @classmethod
    def create(cls, limits: SchedulerConfig, config: PolicyConfig) -> EarliestDeadlineFirst:
        return cls(config.ttft_slo_ms, config.tpot_slo_ms)

    def key(self, request: Request) -> float:
        """When the next token is due."""
        wanted = request.scheduling
        ttft = self._ttft_slo_ms if wanted.ttft_slo_ms is None else wanted.ttft_slo_ms
        tpot = self._tpot_slo_ms if wanted.tpot_slo_ms is None else wanted.tpot_slo_ms
        return request.arrival_time + (ttft + request.num_output_tokens * tpot) / 1000

    def victim(self, request: Request, running: Collection[Request], now: float) -> Request | None:
        return super().victim(request, running, now) if request.status is RequestStatus.RUNNING else None
