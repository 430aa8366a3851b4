"""Scheduling policies, by the name that a configuration gives them."""

from __future__ import annotations

from collections.abc import Callable

from scheduler.errors import ConfigError
from scheduler.policies.fcfs import FirstComeFirstServed
from scheduler.policies.policy import Policy

POLICIES: dict[str, Callable[[], Policy]] = {"fcfs": FirstComeFirstServed}


def create_policy(name: str) -> Policy:
    """Make the policy of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}; known are {', '.join(POLICIES)}", param="policy")
    return POLICIES[name]()


__all__ = ["POLICIES", "Policy", "create_policy"]
