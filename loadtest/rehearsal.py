"""What `shoal simulate` does: plans without a server, with the costs of a profile."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from shoal.loadtest.arrivals import Copies, open_arrivals
from shoal.loadtest.fleet import Fleet, simulate_fleet
from shoal.loadtest.metrics import Cell, Figures, collect
from shoal.loadtest.plan import Plan
from shoal.loadtest.profile import read_profile
from shoal.loadtest.recorded import read_requests, recorded, write_recorded
from shoal.loadtest.records import LoadTestError, PlannedRun
from shoal.loadtest.study import workload_file
from shoal.loadtest.twin import simulate
from shoal.loadtest.workload import WorkloadRequest, read_workload


def rehearse(plan: Plan, costs: Path) -> list[Cell]:
    """Simulate a plan with the profile in the folder `costs`.

    Raises:
        LoadTestError: there is no such profile, it lacks a workload, or a run cannot be simulated.
    """
    profile = read_profile(costs)
    workloads = {}
    for name, requests in _saved(plan, costs).items():
        if len(requests) < plan.num_requests:
            raise LoadTestError(f"workload {name}: {len(requests)} requests were saved, fewer than {plan.num_requests}")
        workloads[name] = requests[: plan.num_requests]
    runs = []
    for planned in plan.runs:
        server = profile.server_with(planned.setup.options)
        runs.append(simulate(planned, workloads[planned.workload], server=server, costs=profile.costs))
    return collect(runs, (), plan.slo)


def rehearse_fleets(plan: Plan, costs: Path, fleets: Sequence[Fleet]) -> list[tuple[PlannedRun, Fleet, Figures]]:
    """Simulate each run of a plan on each of the clusters; raises as `rehearse` does.

    If more requests are asked for than were saved, the workload is copied as often as it takes.
    """
    profile, saved = read_profile(costs), _saved(plan, costs)
    found: list[tuple[PlannedRun, Fleet, Figures]] = []
    for planned in plan.runs:
        requests, server = saved[planned.workload], profile.server_with(planned.setup.options)
        if not (planned.load.users or planned.load.rate) and len(requests) < plan.num_requests:
            raise LoadTestError(f"{len(requests)} requests have times, fewer than {plan.num_requests}: give a --rate")
        is_enough = len(requests) >= plan.num_requests
        asked = requests[: plan.num_requests] if is_enough else Copies(requests, plan.num_requests)
        play = partial(simulate_fleet, planned, asked, server=server, costs=profile.costs)
        found += [(planned, fleet, play(fleet)) for fleet in fleets]
    return found


def write_trace(plan: Plan, costs: Path, file: Path) -> int:
    """Write the requests of a plan's first run as a trace; returns how many.

    Raises:
        LoadTestError: there is no such workload, or the load is none whose times are known before.
    """
    planned = plan.runs[0]
    if planned.load.users:
        raise LoadTestError("a trace needs the times of requests: give a --rate, or a --replay that has them")
    requests = _saved(plan, costs)[planned.workload][: plan.num_requests]
    write_recorded(file, recorded(open_arrivals(planned.load, requests)))
    return len(requests)


def _saved(plan: Plan, costs: Path) -> dict[str, Sequence[WorkloadRequest]]:
    """The workloads of a plan, from the folder of a profile or from the file that is replayed."""
    if plan.replay:
        return {name: read_requests(Path(plan.replay), plan.shrink) for name in plan.names}
    return {name: read_workload(workload_file(costs, name)) for name in plan.names}
