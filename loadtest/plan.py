"""What is compared: from what a user typed to the runs, and their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from shoal.loadtest.metrics import Slo
from shoal.loadtest.records import Load, LoadTestError, PlannedRun, Setup, slug
from shoal.loadtest.workload import WORKLOADS, read_workload

SPECULATION = ("off", "draft", "ngram", "self")
DEFAULT_POLICIES = ("static", "static-nopad", "fcfs", "sjf")
DEFAULT_USERS = 32
SHARES = (0.4, 0.7, 0.9, 1.0, 1.1)
SIZES = {"fast": (96, 1), "full": (256, 2)}  # requests of each workload, and repetitions


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


def make_plan(
    known_policies: Iterable[str],
    *,
    command: str = "",
    policies: Sequence[str] | None = None,
    workloads: Sequence[str] | None = None,
    speculation: Sequence[str] | None = None,
    users: Sequence[int] | None = None,
    rates: Sequence[float] | None = None,
    think_seconds: float = 0.0,
    burstiness: float = 1.0,
    num_requests: int | None = None,
    repetitions: int | None = None,
    seed: int = 0,
    replay: Path | None = None,
    size: str = "fast",
    options: tuple[str, ...] = (),
    model: str = "shoal-moe",
    ttft_slo_ms: float = 1000.0,
    tpot_slo_ms: float = 100.0,
    costs: Path | None = None,
) -> Plan:
    """The plan of what was typed; the full size compares everything if nothing is named.

    Raises:
        LoadTestError: a name is unknown, or two of the arguments contradict each other.
    """
    if users and rates:
        raise LoadTestError("give either --users (closed loops) or --rate (open loops), not both")
    if workloads and replay:
        raise LoadTestError("give either --workload or --replay, not both")
    loads = [Load(users=number, think_seconds=think_seconds, seed=seed) for number in users or ()]
    loads += [Load(rate=rate, burstiness=burstiness, seed=seed) for rate in rates or ()]
    is_open = size == "full" and not (loads or replay)
    repetitions = repetitions or SIZES[size][1]
    if replay:
        replayed, names = read_workload(replay), [slug(replay.stem)]
        num_requests = len(replayed)
        if not loads and all(request.arrival_time is not None for request in replayed):
            loads = [Load(seed=seed)]
    else:
        names = _known("workload", workloads or ("chat",), WORKLOADS)
    if is_open and not (policies or workloads or speculation):
        experiments = _everything(options, seed, repetitions)
    else:
        setups = tuple(
            Setup(policy=policy, speculation=method, options=options)
            for method in _known("speculation", speculation or ("off",), SPECULATION)
            for policy in _known("policies", policies or DEFAULT_POLICIES, known_policies)
        )
        experiments = tuple(
            Experiment(
                workload=name,
                setups=setups,
                loads=tuple(loads or [Load(users=DEFAULT_USERS, seed=seed)]),
                shares=SHARES if is_open else (),
                repetitions=repetitions,
            )
            for name in names
        )
    return Plan(
        experiments=experiments,
        command=command,
        options=options,
        model=model,
        num_requests=num_requests or SIZES[size][0],
        slo=Slo(ttft=ttft_slo_ms / 1000, tpot=tpot_slo_ms / 1000),
        seed=seed,
        replay=str(replay) if replay else None,
        costs=str(costs) if costs else None,
        profile_again=size == "full" and not costs,
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


def _known(field: str, names: Sequence[str], known: Iterable[str]) -> list[str]:
    """Names without repetitions; "all" is all of them, and NAME:CLIENT is known if NAME is."""
    known = list(known)
    for name in names:
        if name.partition(":")[0] not in (*known, "all"):
            raise LoadTestError(f"{field}: unknown {name!r}; known are {', '.join(known)}")
    return known if "all" in names else list(dict.fromkeys(names))
