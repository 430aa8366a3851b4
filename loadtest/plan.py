"""What is compared: from what a user typed to the runs, and their order."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import TypeVar

from msgspec import Struct

from shoal.loadtest.metrics import Slo
from shoal.loadtest.records import Load, LoadTestError, Setup
from shoal.loadtest.workload import WORKLOADS, read_workload

Number = TypeVar("Number", int, float)

SPECULATION = ("off", "draft", "ngram", "self")
SET_BY_US = ("model", "policy", "speculation", "method", "host", "port", "trace", "api-keys")
DEFAULT_POLICIES = ("static", "static-nopad", "fcfs", "sjf")
DEFAULT_USERS = 32
SHARES = (0.4, 0.7, 0.9, 1.0, 1.1)
SIZES = {"fast": (96, 1), "full": (256, 2)}  # requests of each workload, and repetitions


class Asked(Struct, kw_only=True):
    """What a user typed; None is what was not typed."""

    command: str = ""
    options: Sequence[str] = ()
    policies: Sequence[str] | None = None
    workloads: Sequence[str] | None = None
    users: Sequence[int] | None = None
    rates: Sequence[float] | None = None
    think_seconds: float = 0.0
    burstiness: float = 1.0
    num_requests: int | None = None
    seed: int = 0
    replay: Path | None = None
    speculation: Sequence[str] | None = None
    size: str = "fast"
    repetitions: int | None = None
    model: str = "shoal-moe"
    ttft_slo_ms: float = 1000.0
    tpot_slo_ms: float = 100.0
    costs: Path | None = None


class Experiment(Struct, frozen=True, kw_only=True):
    """Setups that are compared on one workload, under each of several loads.

    Attributes:
        workload: name, or "NAME:CLIENT" for one client's requests alone.
        shares: further loads, which are open loops.  Their rates are these shares of the most requests/s that any setup
            with the same options answered in a closed loop of the whole workload.
    """

    workload: str
    setups: tuple[Setup, ...]
    loads: tuple[Load, ...] = ()
    shares: tuple[float, ...] = ()
    repetitions: int = 1


class Plan(Struct, frozen=True, kw_only=True):
    """A whole comparison.

    Attributes:
        command: the line that asked for it.
        options: of all servers.
        num_requests: of each workload.
        replay: a saved workload that takes the place of the generated ones.
        costs: folder of a profile; None takes a profile.
        profile_again: whether the profile is also taken amid the comparison, because machines change their speed.
    """

    experiments: tuple[Experiment, ...] = ()
    command: str = ""
    options: tuple[str, ...] = ()
    model: str = "shoal-moe"
    num_requests: int = 256
    slo: Slo = Slo()
    seed: int = 0
    replay: str | None = None
    costs: str | None = None
    profile_again: bool = False

    @property
    def workloads(self) -> list[str]:
        """Names of all workloads, without clients."""
        return list(dict.fromkeys(experiment.workload.partition(":")[0] for experiment in self.experiments))


class PlannedRun(Struct, frozen=True, kw_only=True):
    """One run that is to be measured."""

    setup: Setup
    workload: str
    load: Load
    repetition: int = 0

    @property
    def name(self) -> str:
        """Unique in a comparison, and good for a file."""
        parts = self.setup.name, *self.setup.options, self.workload, str(self.load), f"r{self.repetition + 1}"
        return slug("-".join(parts))

    def __str__(self) -> str:
        return f"{self.setup.name}, {self.workload}, {self.load}, repetition {self.repetition + 1}"


def slug(name: str) -> str:
    """A name that is good for a file."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def interleave(
    experiments: Iterable[Experiment], loads_of: Callable[[Experiment], Sequence[Load]]
) -> Iterator[PlannedRun]:
    """All runs, repetition by repetition, so that a drift of the machine affects all setups alike.

    The order of the setups is rotated by one from load to load and from repetition to repetition.
    """
    planned = [(experiment, loads_of(experiment)) for experiment in experiments]
    for repetition in range(max((experiment.repetitions for experiment, _ in planned), default=0)):
        for experiment, loads in planned:
            for place, load in enumerate(loads if repetition < experiment.repetitions else ()):
                first = (repetition + place) % len(experiment.setups)
                for setup in experiment.setups[first:] + experiment.setups[:first]:
                    yield PlannedRun(setup=setup, workload=experiment.workload, load=load, repetition=repetition)


# -- from what was typed -----------------------------------------------------------------------------------------------


def make_plan(asked: Asked, known_policies: Iterable[str]) -> Plan:
    """The plan of what was typed; the full size compares everything if nothing is named.

    Raises:
        LoadTestError: a name is unknown, a number is out of range, or an option is not for the servers.
    """
    for option in asked.options:
        name = option.partition("=")[0]
        if name.startswith("--") and name.removeprefix("--").rpartition(".")[2] in SET_BY_US:
            raise LoadTestError(f"{name} cannot stand after --: the command itself sets it")
    loads = _loads(asked)
    num_requests, repetitions = SIZES[asked.size]
    if asked.replay:
        if asked.workloads:
            raise LoadTestError("give either --workload or --replay, not both")
        replayed = read_workload(asked.replay)
        workloads, num_requests = [slug(asked.replay.stem)], len(replayed)
        is_recorded = all(request.arrival_time is not None for request in replayed)
        loads = loads or ([Load(seed=asked.seed)] if is_recorded else [])
    else:
        workloads = _known("workload", asked.workloads or ("chat",), WORKLOADS)
        num_requests = num_requests if asked.num_requests is None else asked.num_requests
    repetitions = _checked("repetitions", repetitions if asked.repetitions is None else asked.repetitions)
    is_open = asked.size == "full" and not (asked.users or asked.rates or asked.replay)
    if is_open and not (asked.policies or asked.workloads or asked.speculation):
        experiments = _everything(tuple(asked.options), asked.seed, repetitions)
    else:
        policies = _known("policies", asked.policies or DEFAULT_POLICIES, known_policies)
        methods = _known("speculation", asked.speculation or ("off",), SPECULATION)
        setups = tuple(
            Setup(policy=policy, speculation=method, options=tuple(asked.options))
            for method in methods
            for policy in policies
        )
        experiments = tuple(
            Experiment(
                workload=workload,
                setups=setups,
                loads=tuple(loads or [Load(users=DEFAULT_USERS, seed=asked.seed)]),
                shares=SHARES if is_open else (),
                repetitions=repetitions,
            )
            for workload in workloads
        )
    return Plan(
        experiments=experiments,
        command=asked.command,
        options=tuple(asked.options),
        model=asked.model,
        num_requests=_checked("requests", num_requests),
        slo=Slo(
            ttft=_checked("ttft-slo-ms", asked.ttft_slo_ms) / 1000,
            tpot=_checked("tpot-slo-ms", asked.tpot_slo_ms) / 1000,
        ),
        seed=asked.seed,
        replay=str(asked.replay) if asked.replay else None,
        costs=str(asked.costs) if asked.costs else None,
        profile_again=asked.size == "full" and not asked.costs,
    )


def _everything(options: tuple[str, ...], seed: int, repetitions: int) -> tuple[Experiment, ...]:
    """What the full size compares if nothing is named: each claim of the policies on the workload that tries it.

    Those of `sjf`, `priority` and `fair` need a queue, and so more requests than rows.  `fair` needs short chunks too,
    because a client waits for the prompts of others that are under way.
    """
    few = max(1, repetitions // 2)

    def users(*counts: int) -> tuple[Load, ...]:
        return tuple(Load(users=count, seed=seed) for count in counts)

    def setups(*policies: str, more: str = "") -> tuple[Setup, ...]:
        return tuple(Setup(policy=policy, options=(*options, *more.split())) for policy in policies)

    every, main = setups(*DEFAULT_POLICIES), users(DEFAULT_USERS)
    drafting = Setup(policy="fcfs", speculation="draft", options=options)
    shortest = setups("fcfs", "sjf", more="--max-num-seqs 2")
    urgent = setups("fcfs", "priority", more="--max-num-seqs 16")
    tenants = setups("fcfs", "fair", more="--max-num-seqs 16 --max-chunk-tokens 128")
    return (
        Experiment(workload="chat", setups=(*every, drafting), loads=main, repetitions=repetitions),
        Experiment(workload="uniform", setups=every, loads=main, repetitions=repetitions),
        Experiment(workload="code", setups=every, loads=main, repetitions=repetitions),
        Experiment(workload="agent", setups=every, loads=main, repetitions=repetitions),
        Experiment(workload="chat", setups=every, loads=users(1, 8, 64)),
        Experiment(workload="chat", setups=every, shares=SHARES, repetitions=repetitions),
        Experiment(workload="chat", setups=shortest, loads=main, shares=(0.8, 0.9, 1.0), repetitions=repetitions),
        Experiment(workload="mixed-priority", setups=urgent, loads=main, shares=(1.2,), repetitions=few),
        Experiment(workload="two-tenants", setups=tenants, loads=main, shares=(1.2,), repetitions=few),
        Experiment(workload="two-tenants:modest", setups=tenants[1:], shares=(1.2,), repetitions=few),
    )


def _loads(asked: Asked) -> list[Load]:
    if asked.users and asked.rates:
        raise LoadTestError("give either --users (closed loops) or --rate (open loops), not both")
    closed = [
        Load(users=_checked("users", users), think_seconds=asked.think_seconds, seed=asked.seed)
        for users in dict.fromkeys(asked.users or ())
    ]
    return closed + [
        Load(rate=_checked("rate", rate), burstiness=asked.burstiness, seed=asked.seed)
        for rate in dict.fromkeys(asked.rates or ())
    ]


def _known(field: str, names: Sequence[str], known: Iterable[str]) -> list[str]:
    """Names without repetitions; "all" is all of them, and NAME:CLIENT is known if NAME is."""
    known = list(known)
    for name in names:
        if name.partition(":")[0] not in (*known, "all"):
            raise LoadTestError(f"{field}: unknown {name!r}; known are {', '.join(known)}")
    return known if "all" in names else list(dict.fromkeys(names))


def _checked(field: str, value: Number) -> Number:
    if isinstance(value, int) and value < 1:
        raise LoadTestError(f"{field} must be at least 1, not {value}")
    if not (isfinite(value) and value > 0):
        raise LoadTestError(f"{field} must be a finite number above 0, not {value:g}")
    return value
