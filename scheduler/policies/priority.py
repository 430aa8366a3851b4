"""The most urgent first."""

from __future__ import annotations

from shoal.scheduler.config import PolicyConfig, SchedulerConfig
from shoal.scheduler.policies.policy import KeyedPolicy
from shoal.scheduler.request import Request


class Priority(KeyedPolicy):
    """The lowest `priority` goes first and may preempt higher ones; waiting makes up for priority.

    Args:
        ageing_seconds: waiting time that makes up for one level.

    A request that has waited a time t counts as `t / ageing_seconds` levels more urgent.  That is the same for all who
    wait, so that the order of two requests never changes: it is that of priority + arrival_time / ageing_seconds.
    Hence two requests never preempt each other in turns, and nobody starves: a request is not overtaken by any that
    arrives more than `ageing_seconds` after it for each level between them.
    """

    def __init__(self, ageing_seconds: float) -> None:
        super().__init__()
        self._ageing_seconds = ageing_seconds

    @classmethod
    def create(cls, limits: SchedulerConfig, config: PolicyConfig) -> Priority:
        return cls(config.ageing_seconds)

    def key(self, request: Request) -> float:
        return request.scheduling.priority + request.arrival_time / self._ageing_seconds
