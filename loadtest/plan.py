"""What a comparison runs: setups, workloads, loads and repetitions, and in which order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

from shoal.loadtest.errors import LoadTestError
from shoal.loadtest.metrics import Slo
from shoal.loadtest.records import Load, Setup
from shoal.loadtest.report_data import load_name


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """One run that is to be measured."""

    setup: Setup
    workload: str
    load: Load
    repetition: int = 0

    @property
    def name(self) -> str:
        """Unique in a comparison, and good for a file."""
        setup = self.setup.name, *self.setup.options
        parts = (*setup, self.workload, load_name(self.load), f"r{self.repetition + 1}")
        return slug("-".join(parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """Setups that are compared on one workload, under each of several loads.

    Attributes:
        workload: name, or "NAME:CLIENT" for one client's requests alone.
        loads: given ones.
        shares: further loads, open loops of Poisson arrivals: their rates are these shares of the most requests/s that
            any setup with the same options answered in a closed loop of the whole workload.
    """

    workload: str
    setups: tuple[Setup, ...]
    loads: tuple[Load, ...] = ()
    shares: tuple[float, ...] = ()
    repetitions: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole comparison.

    Attributes:
        model: of every server.
        num_requests: of each workload.
        replay: a saved workload that takes the place of the generated ones.
        costs: a profile's folder; None takes a profile.
        profile_again: whether runs of a profile are also measured amid the comparison, and the twin fitted to all:
            machines change their speed.
    """

    experiments: tuple[Experiment, ...]
    model: str = "shoal-moe"
    num_requests: int
    slo: Slo
    seed: int = 0
    replay: str | None = None
    costs: str | None = None
    profile_again: bool = False

    @property
    def workloads(self) -> list[str]:
        return list(dict.fromkeys(experiment.workload for experiment in self.experiments))

    @property
    def setups(self) -> list[Setup]:
        return list(dict.fromkeys(setup for experiment in self.experiments for setup in experiment.setups))


def interleave(
    experiments: Iterable[Experiment], loads_of: Callable[[Experiment], Sequence[Load]]
) -> Iterator[PlannedRun]:
    """All runs, repetition by repetition, so that what drifts on the machine meets all alike.

    The order of the setups is rotated by one from load to load and from repetition to repetition.
    """
    planned = [(experiment, loads_of(experiment)) for experiment in experiments]
    for repetition in range(max((experiment.repetitions for experiment, _ in planned), default=0)):
        for experiment, loads in planned:
            if repetition >= experiment.repetitions:
                continue
            for place, load in enumerate(loads):
                first = (repetition + place) % len(experiment.setups)
                for setup in experiment.setups[first:] + experiment.setups[:first]:
                    yield PlannedRun(setup=setup, workload=experiment.workload, load=load, repetition=repetition)


def closed_loop(users: int, *, think_seconds: float = 0.0, seed: int = 0) -> Load:
    """Raises:
    LoadTestError: a number is out of range.
    """
    check_at_least("users", users, 1)
    if not (isfinite(think_seconds) and think_seconds >= 0):
        raise LoadTestError(f"think-seconds must be a finite number of at least 0, not {think_seconds:g}")
    return Load(users=users, think_seconds=think_seconds, seed=seed)


def open_loop(rate: float, *, burstiness: float = 1.0, seed: int = 0) -> Load:
    """Raises:
    LoadTestError: a number is out of range.
    """
    for name, value in (("rate", rate), ("burstiness", burstiness)):
        if not (isfinite(value) and value > 0):
            raise LoadTestError(f"{name} must be a finite number above 0, not {value:g}")
    return Load(rate=rate, burstiness=burstiness, seed=seed)


def check_at_least(field: str, value: int, least: int) -> None:
    """Raises:
    LoadTestError: the value is less.
    """
    if value < least:
        raise LoadTestError(f"{field} must be at least {least}, not {value}")


def slug(name: str) -> str:
    """A name that is good for a file."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
