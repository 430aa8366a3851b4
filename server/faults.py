"""The language of injected faults, and which request meets which; `server/injection.py` carries them out.

A script is a list of rules: `429*2, ok`, or `slow seconds=2 rate=0.1, cut after=3 at=5`.  A rule is a fault with its
parameters.  With `rate`, `every` or `at` it holds for the requests that these choose.  The other rules are a sequence:
each is for one request, or for as many as `*N` says, and the last, if it has no number, for all that follow.

No clock is read here: what a request meets depends on the script, the seed, and the request's number.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from math import inf
from random import Random
from typing import Any

from shoal.scheduler.config import Config, setting
from shoal.scheduler.errors import ConfigError

# The parameters of each fault, and their defaults.
FAULTS: dict[str, dict[str, Any]] = {
    "ok": {},
    "429": {"retry_after": None},
    "500": {},
    "503": {"retry_after": None},
    "slow": {"seconds": 1.0},
    "stall": {"after": 1, "seconds": 1.0},
    "error": {"after": 1},
    "engine_error": {"after": 1},
    "malformed": {"after": 1},
    "cut": {"after": None},
    "kill": {"after": 1},
}
CONDITIONS = ("*", "rate", "every", "at")
# The least and the most of each number.  Those that have a point here need not be whole.
RANGES: dict[str, tuple[float, float]] = {
    "retry_after": (0, 3600),
    "after": (0, 100_000),
    "seconds": (0.0, 3600.0),
    "*": (1, 100_000),
    "rate": (0.0, 1.0),
    "every": (1, 100_000),
    "at": (1, 100_000),
}
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
MAX_SERIES = 10_000  # of which the number is kept; then the one that was idle for longest begins anew


@dataclass(frozen=True)
class Fault:
    """What is to go wrong with a request.

    Attributes:
        after: events that are sent before it, or tokens that are generated; None is before the answer begins.
        seconds: how long it lasts.
        retry_after: seconds after which a client that is refused may come again; None leaves them to the server.
    """

    name: str
    after: int | None = 0
    seconds: float = 0.0
    retry_after: int | None = None


@dataclass(frozen=True)
class _Rule:
    """A fault, or none, and when it holds: one of `CONDITIONS`, and its number."""

    fault: Fault | None
    when: str
    value: float

    def holds(self, number: int, seed: str) -> bool:
        match self.when:
            case "rate":
                return Random(seed).random() < self.value
            case "every":
                return number % self.value == 0
        return number == self.value


class Script:
    """Says which request meets which fault.

    Raises:
        ValueError: the text is no script; the message says why.
    """

    def __init__(self, text: str) -> None:
        *others, last = text.split(",")
        rules = [*(_rule(part, times=1) for part in others), _rule(last, times=inf)]
        self._conditional = [rule for rule in rules if rule.when != "*"]
        self._sequence = [rule for rule in rules if rule.when == "*"]

    def fault(self, number: int, seed: int) -> Fault | None:
        """What the request of this number meets, counted from 1: conditions come first, in their order."""
        for index, rule in enumerate(self._conditional):
            if rule.holds(number, f"{seed} {number} {index}"):
                return rule.fault
        end = 0.0
        for rule in self._sequence:
            end += rule.value
            if number <= end:
                return rule.fault
        return None


class Numbers:
    """Counts the requests of each series by itself."""

    def __init__(self) -> None:
        self._last: dict[Hashable, int] = {}

    def next(self, series: Hashable) -> int:
        """The number of a request that has come: 1, 2 and so on."""
        number = self._last[series] = self._last.pop(series, 0) + 1
        if len(self._last) > MAX_SERIES:
            del self._last[next(iter(self._last))]
        return number


@dataclass(frozen=True, kw_only=True)
class FaultsConfig(Config):
    """Faults on purpose, for people who test their own programs against the server."""

    fault_script: str | None = setting(
        None, help="Faults that requests meet, such as '429*2, ok' or 'cut after=3 rate=0.1'; see docs/faults.md."
    )
    fault_seed: int = setting(0, help="Seed of what the rates in a script decide.")
    fault_header: bool = setting(False, help="Whether a request may bring a script of its own, as X-Shoal-Fault.")

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            Script(self.fault_script or "ok")
        except ValueError as error:
            raise ConfigError(f"fault_script: {error}", param="fault_script") from error

    @property
    def is_on(self) -> bool:
        return self.fault_script is not None or self.fault_header


def _rule(text: str, times: float) -> _Rule:
    """Read a rule; `times` is for how many requests it holds if it does not say."""
    name, *words = text.replace("*", " *=").split() or [""]
    if name not in FAULTS:
        raise ValueError(f"unknown fault {name[:40]!r}: there are {', '.join(FAULTS)}")
    known = (*FAULTS[name], *CONDITIONS)
    given: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in known or key in given:
            raise ValueError(f"{name} may have {', '.join(known)}, each once, and not {word[:40]!r}")
        given[key] = _number(key, value)
    conditions = [key for key in given if key in CONDITIONS] or ["*"]
    if len(conditions) > 1:
        raise ValueError(f"{name} may have only one of {', '.join(CONDITIONS)}, not {' and '.join(conditions)}")
    when = conditions[0]
    value = given.pop(when, times)
    return _Rule(None if name == "ok" else Fault(name, **FAULTS[name] | given), when, value)


def _number(key: str, text: str) -> float:
    """Read the number of a parameter or a condition."""
    least, most = RANGES[key]
    kind = type(least)
    found = _NUMBER.fullmatch(text)
    if found is None or (found[1] and kind is int) or not least <= float(text) <= most:
        words = "an integer" if kind is int else "a number"
        raise ValueError(f"{key} must be {words} from {least:g} to {most:g}, not {text[:40]!r}")
    return kind(text)
