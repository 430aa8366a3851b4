"""Earliest deadline first."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from shoal.scheduler.config import Config, setting
from shoal.scheduler.policies.policy import KeyedPolicy
from shoal.scheduler.request import Request, RequestStatus


class EarliestDeadlineFirst(KeyedPolicy):
    """The request whose next token is due first goes first; the one with the most slack gives way.

    The first token is due `ttft_slo_ms` after arrival, and each further one `tpot_slo_ms` after the one before was due
    (Liu and Layland 1973).  A token costs much the same for every request, so that the earliest deadline is the least
    slack.  Nothing is dropped: a late request goes first.  A waiting request never takes a row: tokens that come ahead
    of time are no reason to compute the victim's again.  No request starves: none that arrives after its deadline
    overtakes it.
    """

    name = "deadline"

    @dataclass(frozen=True, kw_only=True)
    class Knobs(Config):
        ttft_slo_ms: float = setting(
            1000.0, above=0, help="For deadline: wanted time to the first token, of requests that name none."
        )
        tpot_slo_ms: float = setting(
            100.0, above=0, help="For deadline: wanted time for each further token, of requests that name none."
        )

    knobs: Knobs

    def key(self, request: Request) -> float:
        """When the next token is due."""
        wanted = request.scheduling
        ttft = self.knobs.ttft_slo_ms if wanted.ttft_slo_ms is None else wanted.ttft_slo_ms
        tpot = self.knobs.tpot_slo_ms if wanted.tpot_slo_ms is None else wanted.tpot_slo_ms
        return request.arrival_time + (ttft + request.num_output_tokens * tpot) / 1000

    def victim(self, request: Request, running: Collection[Request], now: float) -> Request | None:
        return super().victim(request, running, now) if request.status is RequestStatus.RUNNING else None
