"""From what a user types to a plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from shoal.loadtest.errors import LoadTestError
from shoal.loadtest.metrics import Slo
from shoal.loadtest.plan import Experiment, Plan, check_at_least, closed_loop, open_loop, slug
from shoal.loadtest.records import Load, Setup
from shoal.loadtest.simulator import SJF_ORACLE
from shoal.loadtest.workload import read_workload
from shoal.loadtest.workloads import WORKLOADS
from shoal.scheduler.policies import POLICIES

SPECULATION = ("off", "draft", "ngram", "self")
SET_BY_US = ("model", "policy", "speculation", "method", "host", "port", "trace", "api-keys")

DEFAULT_POLICIES = ("static", "static-nopad", "fcfs", "sjf")
DEFAULT_USERS = 32

Names = Sequence[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much a profile of the comparison runs; `shares` as in `Experiment`."""

    num_requests: int
    repetitions: int
    shares: tuple[float, ...] = ()


SIZES = {
    "fast": Size(num_requests=96, repetitions=1),
    "full": Size(num_requests=256, repetitions=2, shares=(0.4, 0.7, 0.9, 1.0, 1.1)),
}


def plan_comparison(
    *,
    options: Sequence[str],
    policies: Names,
    workloads: Names,
    users: Sequence[int] | None,
    rates: Sequence[float] | None,
    think_seconds: float,
    burstiness: float,
    num_requests: int | None,
    seed: int,
    replay: Path | None,
    speculation: Names,
    size: str,
    repetitions: int | None,
    model: str,
    ttft_slo_ms: float,
    tpot_slo_ms: float,
    costs: Path | None,
) -> Plan:
    """What `shoal loadtest` runs: what is named, in the profile's size, or all that the full profile has.

    Raises:
        LoadTestError: a name is unknown, a number out of range, or an option is not for the servers.
    """
    _check_options(options)
    chosen = SIZES[size]
    loads = _loads(users, rates, think_seconds, burstiness, seed)
    repetitions = chosen.repetitions if repetitions is None else repetitions
    check_at_least("repetitions", repetitions, 1)
    names, replayed, loads = _workloads(workloads, replay, loads, seed)
    if size == "full" and not (policies or workloads or users or rates or replay or speculation):
        experiments = _everything(options, seed, repetitions)
    else:
        experiments = _compare(
            workloads=names,
            policies=_known("policies", policies or DEFAULT_POLICIES, POLICIES),
            speculation=_known("speculation", speculation or ("off",), SPECULATION),
            loads=loads,
            shares=() if users or rates or replay else chosen.shares,
            repetitions=repetitions,
            options=options,
        )
    return Plan(
        experiments=experiments,
        model=model,
        num_requests=replayed or _count(num_requests, chosen.num_requests),
        slo=Slo(ttft=_positive("ttft-slo-ms", ttft_slo_ms) / 1000, tpot=_positive("tpot-slo-ms", tpot_slo_ms) / 1000),
        seed=seed,
        replay=str(replay) if replay else None,
        costs=str(costs) if costs else None,
        profile_again=size == "full" and not costs,
    )


def plan_simulation(
    *,
    options: Sequence[str],
    policies: Names,
    workloads: Names,
    users: Sequence[int] | None,
    rates: Sequence[float] | None,
    think_seconds: float,
    burstiness: float,
    num_requests: int | None,
    seed: int,
    replay: Path | None,
) -> Plan:
    """What `shoal simulate` runs.

    Raises:
        LoadTestError: as `plan_comparison`.
    """
    _check_options(options)
    loads = _loads(users, rates, think_seconds, burstiness, seed)
    names, replayed, loads = _workloads(workloads, replay, loads, seed)
    experiments = _compare(
        workloads=names,
        policies=_known("policies", policies or DEFAULT_POLICIES, (*POLICIES, SJF_ORACLE)),
        speculation=("off",),
        loads=loads,
        shares=(),
        repetitions=1,
        options=options,
    )
    count = replayed or _count(num_requests, SIZES["fast"].num_requests)
    return Plan(
        experiments=experiments, num_requests=count, slo=Slo(), seed=seed, replay=str(replay) if replay else None
    )


def plan_profile(*, options: Sequence[str], model: str, num_requests: int, seed: int) -> Plan:
    """What `shoal profile` needs to know.

    Raises:
        LoadTestError: as `plan_comparison`.
    """
    _check_options(options)
    return Plan(experiments=(), model=model, num_requests=_count(num_requests, 0), slo=Slo(), seed=seed)


def _compare(
    *,
    workloads: Sequence[str],
    policies: Sequence[str],
    speculation: Sequence[str],
    loads: Sequence[Load],
    shares: Sequence[float],
    repetitions: int,
    options: Sequence[str],
) -> tuple[Experiment, ...]:
    """Each policy with each method of speculation, on each workload, under each load."""
    setups = tuple(
        Setup(policy=policy, speculation=method, options=tuple(options))
        for method in dict.fromkeys(speculation)
        for policy in dict.fromkeys(policies)
    )
    return tuple(
        Experiment(
            workload=workload,
            setups=setups,
            loads=tuple(dict.fromkeys(loads)),
            shares=tuple(shares),
            repetitions=repetitions,
        )
        for workload in dict.fromkeys(workloads)
    )


def _everything(options: Sequence[str], seed: int, repetitions: int) -> tuple[Experiment, ...]:
    """What the full profile runs if nothing else is named: each claim of the policies on the workload that tries it.

    Those of `sjf`, `priority` and `fair` need a queue, and so more requests than rows; and `fair` short chunks, for a
    client waits for the prompts of others that are under way.
    """
    few = max(1, repetitions // 2)

    def users(*counts: int) -> tuple[Load, ...]:
        return tuple(Load(users=count, seed=seed) for count in counts)

    def setups(*policies: str, rows: int | None = None, chunk: int | None = None) -> tuple[Setup, ...]:
        limits = {"--max-num-seqs": rows, "--max-chunk-tokens": chunk}
        added = [text for name, limit in limits.items() if limit is not None for text in (name, str(limit))]
        return tuple(Setup(policy=policy, options=(*options, *added)) for policy in policies)

    every, main, shares = setups(*DEFAULT_POLICIES), users(DEFAULT_USERS), SIZES["full"].shares
    drafting = Setup(policy="fcfs", speculation="draft", options=tuple(options))
    shortest, urgent, tenants = (
        setups("fcfs", "sjf", rows=2),
        setups("fcfs", "priority", rows=16),
        setups("fcfs", "fair", rows=16, chunk=128),
    )
    return (
        Experiment(workload="chat", setups=(*every, drafting), loads=main, repetitions=repetitions),
        Experiment(workload="uniform", setups=every, loads=main, repetitions=repetitions),
        Experiment(workload="code", setups=every, loads=main, repetitions=repetitions),
        Experiment(workload="agent", setups=every, loads=main, repetitions=repetitions),
        Experiment(workload="chat", setups=every, loads=users(1, 8, 64)),
        Experiment(workload="chat", setups=every, shares=shares),
        Experiment(workload="chat", setups=shortest, loads=main, shares=(0.8, 0.9, 1.0), repetitions=repetitions),
        Experiment(workload="mixed-priority", setups=urgent, loads=main, shares=(1.2,), repetitions=few),
        Experiment(workload="two-tenants", setups=tenants, loads=main, shares=(1.2,), repetitions=few),
        Experiment(workload="two-tenants:modest", setups=tenants[1:], shares=(1.2,), repetitions=few),
    )


# -- what was typed ----------------------------------------------------------------------------------------------------


def _loads(
    users: Sequence[int] | None, rates: Sequence[float] | None, think_seconds: float, burstiness: float, seed: int
) -> list[Load]:
    """The loads that were named, none if none were."""
    if users and rates:
        raise LoadTestError("give either --users (closed loops) or --rate (open loops), not both")
    if users:
        return [closed_loop(count, think_seconds=think_seconds, seed=seed) for count in users]
    return [open_loop(rate, burstiness=burstiness, seed=seed) for rate in rates or ()]


def _workloads(
    workloads: Names, replay: Path | None, loads: list[Load], seed: int
) -> tuple[Sequence[str], int, list[Load]]:
    """Names of the workloads, the number of requests of one that is replayed, and the loads.

    What is replayed is sent when it was recorded, if nothing else is asked for and it says so.
    """
    default = [Load(users=DEFAULT_USERS, seed=seed)]
    if replay is None:
        return _known("workload", workloads or ("chat",), WORKLOADS), 0, loads or default
    if workloads:
        raise LoadTestError("give either --workload or --replay, not both")
    requests = read_workload(replay)
    is_recorded = all(request.arrival_time is not None for request in requests)
    return [slug(replay.stem)], len(requests), loads or ([Load(seed=seed)] if is_recorded else default)


def _known(field: str, names: Sequence[str], known: Iterable[str]) -> list[str]:
    """Names without repetitions; "all" is all of them."""
    known = list(known)
    for name in names:
        if name.partition(":")[0] not in (*known, "all"):
            raise LoadTestError(f"{field}: unknown {name!r}; known are {', '.join(known)}")
    return known if "all" in names else list(dict.fromkeys(names))


def _count(given: int | None, default: int) -> int:
    if given is None:
        return default
    check_at_least("requests", given, 1)
    return given


def _positive(field: str, value: float) -> float:
    if not (isfinite(value) and value > 0):
        raise LoadTestError(f"{field} must be a finite number above 0, not {value:g}")
    return value


def _check_options(options: Sequence[str]) -> None:
    """Refuse those that the comparison itself gives to its servers."""
    for option in options:
        name = option.partition("=")[0]
        if name.startswith("--") and name.removeprefix("--").rpartition(".")[2] in SET_BY_US:
            raise LoadTestError(f"{name} cannot stand after --: it is set by the command itself")
