"""Scheduling policies: every class with a `name` in a module of this package is one."""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules

from shoal.scheduler.errors import ConfigError
from shoal.scheduler.policies.policy import Policy as Policy


def discover_policies() -> dict[str, type[Policy]]:
    """The policies that the modules of this package define, by name."""
    modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
    kinds = [
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Policy) and kind.__module__ == module.__name__
    ]
    named = [kind for kind in kinds if "name" in vars(kind)]
    policies = {kind.name: kind for kind in sorted(named, key=lambda kind: kind.name)}
    assert len(policies) == len(named), "two policies have the same name"
    return policies


POLICIES = discover_policies()


def find_policy(name: str) -> type[Policy]:
    """The policy of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}; known are {', '.join(POLICIES)}", param="policy")
    return POLICIES[name]


def describe_policies() -> dict[str, str]:
    """One line on each policy, by name."""
    return {name: (inspect.getdoc(kind) or "").partition("\n")[0] for name, kind in POLICIES.items()}
