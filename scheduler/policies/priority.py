"""The most urgent first."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.scheduler.config import Config, setting
from shoal.scheduler.policies.policy import KeyedPolicy
from shoal.scheduler.request import Request


class Priority(KeyedPolicy):
    """The lowest `priority` goes first and may preempt higher ones; waiting makes up for priority.

    A request that has waited a time t counts as `t / ageing_seconds` levels more urgent.  That is the same for all
    waiting requests, so that the order of two requests never changes: it is that of
    priority + arrival_time / ageing_seconds.  Hence two requests never preempt each other in turns, and no request
    starves: none that arrives more than `ageing_seconds` later for each level between the two overtakes it.
    """

    name = "priority"

    @dataclass(frozen=True, kw_only=True)
    class Knobs(Config):
        ageing_seconds: float = setting(
            10.0, above=0, help="For priority: waiting time in seconds that makes up for one level of priority."
        )

    knobs: Knobs

    def key(self, request: Request) -> float:
        return request.scheduling.priority + request.arrival_time / self.knobs.ageing_seconds
