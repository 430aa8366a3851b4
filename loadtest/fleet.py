"""The twin of a cluster: many engines behind one router, which come and go; and the figures of such a run."""

from __future__ import annotations

import gc
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
from msgspec import Struct

from shoal.loadtest.costs import CostModel
from shoal.loadtest.metrics import Figures, quantiles
from shoal.loadtest.records import LoadTestError, PlannedRun, RequestRecord, ServerInfo
from shoal.loadtest.replica import Delivery, TwinEngine
from shoal.loadtest.report import text, title
from shoal.loadtest.sketch import Sketch
from shoal.loadtest.twin import Simulation, played_engines, policy_of
from shoal.loadtest.workload import WorkloadRequest
from shoal.scheduler.autoscaling import INTERVAL_SECONDS, Autoscaler
from shoal.scheduler.plain_routing import ROUTINGS
from shoal.scheduler.policies.fcfs import FirstComeFirstServed

_SHOWN = (
    *("requests", "errors", "throughput", "request rate", "ttft p50", "ttft p99", "tpot p50", "e2e p50", "e2e p99"),
    *("cached share", "most to mean work", "resumed", "least replicas", "most replicas"),
)


class Fleet(Struct, frozen=True, kw_only=True):
    """The engines of a cluster.

    Attributes:
        replicas: at the start.
        router: one of `ROUTINGS`.
        autoscale: least and most engines; None leaves their number as it is.
        kills: when an engine dies, and its number.  Another takes its place when that has started.
        additions: when the start of further engines begins, and how many.
        start_seconds: from the start of an engine until it is ready.

    Raises:
        LoadTestError: there is no such router, or an engine is killed that there cannot be.
    """

    replicas: int = 1
    router: str = "prefix"
    autoscale: tuple[int, int] | None = None
    kills: tuple[tuple[float, int], ...] = ()
    additions: tuple[tuple[float, int], ...] = ()
    start_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.router not in ROUTINGS:
            raise LoadTestError(f"router: unknown {self.router!r}; known are {', '.join(ROUTINGS)}")
        if self.autoscale and not 1 <= self.autoscale[0] <= self.replicas <= self.autoscale[1]:
            raise LoadTestError(
                f"autoscale: {self.replicas} replicas must be within {self.autoscale[0]}:{self.autoscale[1]}"
            )
        most = max(self.replicas, self.autoscale[1] if self.autoscale else 0) + sum(n for _, n in self.additions)
        for _, number in self.kills:
            if not 0 <= number < most:
                raise LoadTestError(f"kill: there is no replica {number}; they are numbered from 0 to {most - 1}")


def simulate_fleet(
    planned: PlannedRun, requests: Sequence[WorkloadRequest], fleet: Fleet, *, server: ServerInfo, costs: CostModel
) -> Figures:
    """The figures of a run on a cluster; latencies in seconds.

    Args:
        server: as each engine would say of itself.

    Raises:
        ConfigError, LoadTestError: as `simulate` does.
    """
    policy = policy_of(planned, requests, server)
    engine: Callable[[], TwinEngine] = played_engines(policy, costs, planned.repetition, records_steps=False)
    sees_all = len(server.limits.cache_groups) == 1 and server.limits.cache_groups[0].sees_all
    if planned.setup.policy == FirstComeFirstServed.name and sees_all and not costs.crowding:
        engine = partial(Sketch, server.limits, costs, {})
    routing = ROUTINGS[fleet.router]()
    run = FleetRun(requests, planned.load, engine, costs.send_seconds, num_replicas=fleet.replicas, routing=routing)
    run.follow(fleet)
    is_collecting = gc.isenabled()
    gc.disable()  # nothing that a request leaves behind is a cycle
    try:
        run.run()
    finally:
        if is_collecting:
            gc.enable()
    return run.figures()


def fleet_table(found: Sequence[tuple[PlannedRun, Fleet, Figures]]) -> list[dict[str, str]]:
    """The runs and their figures as people read them."""
    return [
        {
            "workload": planned.workload,
            "load": str(planned.load),
            "policy": planned.setup.policy,
            "router": fleet.router,
            **{title(name): text(name, figures.get(name)) for name in _SHOWN},
        }
        for planned, fleet, figures in found
    ]


class FleetRun(Simulation[TwinEngine]):
    """A simulation in which engines come and go, and of which only figures are kept.

    Attributes:
        num_resumed: requests that went on elsewhere, each as often as it did.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sent_at, self._ttft, self._tpot, self._e2e = (array("d") for _ in range(4))
        self._num_prompt_tokens = self._num_cached_tokens = self._num_output_tokens = self._num_errors = 0
        self._last_seen_at = 0.0
        self.num_resumed = 0
        self._work: dict[int, int] = {}  # output tokens by engine
        super().__init__(*args, **kwargs)
        self._num_asked = self._least = self._most = len(self.replicas)  # engines that are there or starting

    def follow(self, fleet: Fleet) -> None:
        """Have engines come and go as the fleet says."""
        self._start_seconds = fleet.start_seconds
        for time, number in fleet.kills:
            self.at(time, self._kill, number)
        for time, how_many in fleet.additions:
            self.at(time, self._add, how_many)
        if fleet.autoscale:
            self.at(INTERVAL_SECONDS, self._scale, Autoscaler(*fleet.autoscale))

    def lose(self, number: int) -> None:
        self.num_resumed += len(self.replicas[number].requests)
        super().lose(number)
        self._least = min(self._least, len(self.replicas))

    def start(self, number: int) -> None:
        super().start(number)
        self._work.setdefault(number, 0)

    def note(self, record: RequestRecord) -> None:
        if record.error is not None or record.finished_at is None:
            self._num_errors += 1
            return
        times, count = record.token_times, record.num_output_tokens
        self._sent_at.append(record.sent_at)
        self._ttft.append(times[0] - record.sent_at)
        if count > 1:
            self._tpot.append((times[-1] - times[0]) / (count - 1))
        self._e2e.append(record.finished_at - record.sent_at)
        self._num_prompt_tokens += record.num_prompt_tokens
        self._num_cached_tokens += record.num_cached_tokens
        self._num_output_tokens += count
        self._last_seen_at = max(self._last_seen_at, record.finished_at)

    def figures(self) -> Figures:
        """What came of it, by the names that all figures have."""
        count, begin = len(self._e2e), min(self._sent_at, default=0.0)
        seconds = self._last_seen_at - begin
        found: Figures = {
            "requests": count + self._num_errors,
            "errors": self._num_errors,
            "seconds": seconds,
            "throughput": self._num_output_tokens / seconds if seconds else 0.0,
            "request rate": count / seconds if seconds else 0.0,
            "cached share": self._num_cached_tokens / max(self._num_prompt_tokens, 1),
        }
        for name, values in (("ttft", self._ttft), ("tpot", self._tpot), ("e2e", self._e2e)):
            found |= quantiles(name, np.array(values))
        work = list(self._work.values())
        found["most to mean work"] = max(work) / fmean(work) if any(work) else 0.0
        return found | {"resumed": self.num_resumed, "least replicas": self._least, "most replicas": self._most}

    # -- engines come and go ---------------------------------------------------------------------------------------

    def _kill(self, number: int) -> None:
        if number in self.replicas:
            self.lose(number)
            self.at(self.now + self._start_seconds, self.start, number)

    def _add(self, how_many: int) -> None:
        for _ in range(how_many):
            self.at(self.now + self._start_seconds, self._join)
        self._num_asked += how_many

    def _join(self) -> None:
        """A further engine is ready."""
        self.start(max(self._work) + 1)
        self._most = max(self._most, len(self.replicas))

    def _scale(self, autoscaler: Autoscaler) -> None:
        """What Serve's controller does each second."""
        if not self._flights and not self._events:
            return  # all is over
        seen = [(replica.queue_seconds(self.now), replica.kv_cache_usage) for replica in self.replicas.values()]
        ages, usages = zip(*seen, strict=True) if seen else ((0.0,), (0.0,))
        wanted = autoscaler.decide(self._num_asked, fmean(ages), fmean(usages))
        if wanted > self._num_asked:
            self._add(wanted - self._num_asked)
        too_many = min(self._num_asked, len(self.replicas)) - wanted
        for number in sorted(self.replicas, reverse=True)[: max(too_many, 0)]:
            self._num_asked -= 1
            self.lose(number)
        self.at(self.now + INTERVAL_SECONDS, self._scale, autoscaler)

    def _deliver(self, number: int, delivery: Delivery) -> None:
        self._work[number] += delivery.num_tokens
        super()._deliver(number, delivery)
