"""What is compared: from what a user typed to the runs, and their order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from shoal.loadtest.metrics import Slo
from shoal.loadtest.recorded import read_requests
from shoal.loadtest.records import GENERATE, Load, LoadTestError, PlannedRun, Setup, slug
from shoal.loadtest.workload import WORKLOADS

SPECULATION = ("off", "draft", "mtp", "self", "suffix")
DEFAULT_POLICIES = ("static", "static-nopad", "fcfs", "sjf")
DEFAULT_USERS = 32
SHARES = (0.4, 0.7, 0.9, 1.0, 1.1)
SIZES = {"fast": (96, 1), "full": (256, 2)}  # requests of each workload, and repetitions


class Plan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A comparison as it was asked for, and the runs that it comes to.

    Attributes:
        command: the line that asked for it.
        hugging_face: whether Hugging Face's `generate` is compared, too.
        size: one of `SIZES`, for what is not given.
        replay: a saved workload, or a trace of others, that takes the place of the generated ones.
        shrink: see `recorded.Trace`.
        options: of all servers.
        costs: folder of a profile; None takes a profile.
        runs: in the order in which they are measured; none of a profile alone.
    """

    command: str = ""
    policies: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ()
    speculation: tuple[str, ...] = ()
    hugging_face: bool = False
    users: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    think_seconds: float = 0.0
    burstiness: float = 1.0
    num_requests: int = 256
    repetitions: int = 1
    seed: int = 0
    size: str = "fast"
    replay: str | None = None
    shrink: int = 1
    model: str = "shoal-moe"
    options: tuple[str, ...] = ()
    ttft_slo_ms: float = 1000.0
    tpot_slo_ms: float = 100.0
    costs: str | None = None
    runs: tuple[PlannedRun, ...] = ()

    @property
    def slo(self) -> Slo:
        return Slo(ttft=self.ttft_slo_ms / 1000, tpot=self.tpot_slo_ms / 1000)

    @property
    def names(self) -> list[str]:
        """Of all workloads."""
        return list(dict.fromkeys(run.workload for run in self.runs))


def make_plan(known_policies: Iterable[str], **asked: Any) -> Plan:
    """The plan of what was typed, fields of `Plan`; the full size compares everything if nothing is named.

    Raises:
        LoadTestError: a name is unknown, or two of the fields contradict each other.
    """
    num_requests, repetitions = SIZES[asked.get("size", "fast")]
    sizes = {"num_requests": num_requests, "repetitions": repetitions}
    plan = Plan(**sizes | {name: value for name, value in asked.items() if value is not None})
    if plan.users and plan.rates:
        raise LoadTestError("give either --users (closed loops) or --rate (open loops), not both")
    if plan.workloads and plan.replay:
        raise LoadTestError("give either --workload or --replay, not both")
    names = _known("workload", plan.workloads or ("chat",), WORKLOADS)
    loads = [Load(users=number, think_seconds=plan.think_seconds, seed=plan.seed) for number in plan.users]
    loads += [Load(rate=rate, burstiness=plan.burstiness, seed=plan.seed) for rate in plan.rates]
    finds_saturation = plan.size == "full" and not loads and not plan.replay
    if plan.replay:
        requests, names = read_requests(Path(plan.replay), plan.shrink), [slug(Path(plan.replay).stem)]
        if asked.get("num_requests") is None:
            plan = replace(plan, num_requests=len(requests))
        if not loads and all(request.arrival_time is not None for request in requests):
            loads = [Load(seed=plan.seed)]
    if finds_saturation and not (plan.policies or plan.workloads or plan.speculation):
        return replace(plan, runs=_in_order(_everything(plan)))
    loads = loads or [Load(users=DEFAULT_USERS, seed=plan.seed)]
    if finds_saturation:
        loads += [Load(share=share, seed=plan.seed) for share in SHARES]
    setups = [
        Setup(policy=policy, speculation=method, options=plan.options)
        for method in _known("speculation", plan.speculation or ("off",), SPECULATION)
        for policy in _known("policies", plan.policies or DEFAULT_POLICIES, known_policies)
    ]
    setups += _generate(plan)
    return replace(plan, runs=_in_order(run for name in names for run in crossed(plan, name, setups, loads)))


def crossed(
    plan: Plan, workload: str, setups: Sequence[Setup], loads: Sequence[Load], repetitions: int = 0
) -> Iterator[PlannedRun]:
    """Each setup under each load; the order of setups turns by one from load to load and from repetition to repetition.

    Args:
        repetitions: by default those of the plan.
    """
    for repetition in range(repetitions or plan.repetitions):
        for place, load in enumerate(loads):
            first = (repetition + place) % len(setups)
            for setup in [*setups[first:], *setups[:first]]:
                yield PlannedRun(setup=setup, workload=workload, load=load, repetition=repetition)


def _in_order(runs: Iterable[PlannedRun]) -> tuple[PlannedRun, ...]:
    """Closed loops first, which find the capacity; then by repetition, so that a drift of the machine affects all."""
    return tuple(sorted(runs, key=lambda run: (run.load.share > 0, run.repetition)))


def _everything(plan: Plan) -> Iterator[PlannedRun]:
    """What the full size compares if nothing is named: each claim of the policies on the workload that tries it.

    Those of `sjf`, `priority` and `fair` need a queue, and so more requests than rows.  `fair` needs short chunks too,
    because a client waits for the prompts of others that are under way.
    """

    def users(*counts: int) -> list[Load]:
        return [Load(users=count, seed=plan.seed) for count in counts]

    def shares(*values: float) -> list[Load]:
        return [Load(share=share, seed=plan.seed) for share in values]

    def setups(*policies: str, more: str = "") -> list[Setup]:
        return [Setup(policy=policy, options=(*plan.options, *more.split())) for policy in policies]

    few = max(1, plan.repetitions // 2)
    every, main = setups(*DEFAULT_POLICIES), users(DEFAULT_USERS)
    shortest = setups("fcfs", "sjf", more="--max-num-seqs 2")
    urgent = setups("fcfs", "priority", more="--max-num-seqs 16")
    tenants = setups("fcfs", "fair", more="--max-num-seqs 16 --max-chunk-tokens 128")
    drafting = Setup(policy="fcfs", speculation="draft", options=plan.options)
    yield from crossed(plan, "chat", [*every, drafting, *_generate(plan)], main)
    for name in ("uniform", "code", "agent"):
        yield from crossed(plan, name, every, main)
    yield from crossed(plan, "chat", every, users(1, 8, 64), repetitions=1)
    yield from crossed(plan, "chat", every, shares(*SHARES))
    yield from crossed(plan, "chat", shortest, main + shares(0.8, 0.9, 1.0))
    yield from crossed(plan, "mixed-priority", urgent, main + shares(1.2), few)
    yield from crossed(plan, "two-tenants", tenants, main + shares(1.2), few)


def _generate(plan: Plan) -> list[Setup]:
    return [Setup(policy=GENERATE, options=plan.options)] if plan.hugging_face else []


def _known(field: str, names: Sequence[str], known: Iterable[str]) -> list[str]:
    """Names without repetitions; "all" is all of them."""
    known = list(known)
    for name in names:
        if name not in (*known, "all"):
            raise LoadTestError(f"{field}: unknown {name!r}; known are {', '.join(known)}")
    return known if "all" in names else list(dict.fromkeys(names))
