"""Scheduling policies, by the name that a configuration gives them."""

from __future__ import annotations

import inspect

from shoal.scheduler.config import PolicyConfig, SchedulerConfig
from shoal.scheduler.errors import ConfigError
from shoal.scheduler.policies.deadline import EarliestDeadlineFirst
from shoal.scheduler.policies.fair import VirtualTokenCounter
from shoal.scheduler.policies.fcfs import FirstComeFirstServed
from shoal.scheduler.policies.policy import Policy
from shoal.scheduler.policies.priority import Priority
from shoal.scheduler.policies.sjf import ShortestJobFirst
from shoal.scheduler.policies.static import Static, StaticWithoutPadding

POLICIES: dict[str, type[Policy]] = {
    "fcfs": FirstComeFirstServed,
    "priority": Priority,
    "sjf": ShortestJobFirst,
    "fair": VirtualTokenCounter,
    "deadline": EarliestDeadlineFirst,
    "static": Static,
    "static-nopad": StaticWithoutPadding,
}


def find_policy(name: str) -> type[Policy]:
    """The policy of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}; known are {', '.join(POLICIES)}", param="policy")
    return POLICIES[name]


def create_policy(name: str, limits: SchedulerConfig, config: PolicyConfig | None = None) -> Policy:
    """Make the policy of this name; its knobs stand at their defaults if they are not given.

    Raises:
        ConfigError: there is none.
    """
    return find_policy(name).create(limits, config or PolicyConfig())


def describe_policies() -> dict[str, str]:
    """One line on each policy, by name."""
    return {name: (inspect.getdoc(kind) or "").partition("\n")[0] for name, kind in POLICIES.items()}


__all__ = ["POLICIES", "Policy", "create_policy", "describe_policies", "find_policy"]
