"""The digital twin beside a comparison: its profile, and what it predicts of each run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

from shoal.loadtest.costs import CostModel, StepShape
from shoal.loadtest.errors import LoadTestError
from shoal.loadtest.measuring import Measurer
from shoal.loadtest.plan import PlannedRun
from shoal.loadtest.preparation import Facts, Key
from shoal.loadtest.profile import SERIES, Profile, make_profile, measure_series
from shoal.loadtest.records import Load, Run, Setup
from shoal.loadtest.simulator import simulate
from shoal.loadtest.steps import Step
from shoal.loadtest.storage import Storage
from shoal.loadtest.workload import WorkloadRequest, read_workload, write_workload
from shoal.loadtest.workload_files import Sending
from shoal.scheduler.errors import ConfigError

PROFILE_WORKLOADS: tuple[Key, ...] = tuple(
    dict.fromkeys((stretch.workload, stretch.num_requests, 0) for stretch in SERIES)
)
"""What a profile needs of `Preparation.run`."""


class ProfileRuns:
    """The runs of a profile, the series again and again: those that the folder has, and further ones as they are asked
    for.

    Args:
        workloads: those of `PROFILE_WORKLOADS`.
        storage: of a folder that holds nothing else.
        measurer: of that storage.

    Attributes:
        taken: all so far.
    """

    def __init__(
        self, facts: Facts, workloads: Mapping[Key, Sequence[WorkloadRequest]], storage: Storage, measurer: Measurer
    ) -> None:
        self.taken: list[Run] = []
        self._facts = facts
        self._storage = storage
        self._measurer = measurer
        self._series = measure_series(
            self._measure, lambda *key: workloads[key], facts.options, chain.from_iterable(repeat(SERIES))
        )

    def take(self) -> None:
        """Measure the next one.

        Raises:
            LoadTestError: a server failed.
        """
        self.taken.append(next(self._series))

    def profile(self, versions: Mapping[str, str]) -> Profile:
        """What follows from all that were taken.

        Raises:
            LoadTestError: they are too little.
        """
        limits, knobs = self._facts.config
        return make_profile(
            self.taken,
            model=self._facts.model,
            limits=limits,
            knobs=knobs,
            options=self._facts.options,
            versions=versions,
        )

    def _measure(self, workload: Sequence[WorkloadRequest], load: Load, setup: Setup) -> Run:
        name = f"profile-{len(self.taken) + 1}"
        planned = PlannedRun(setup=setup, workload=name, load=load)
        folder = self._storage.find(planned)
        if folder is None:
            file = self._storage.workload_file(name)
            write_workload(file, workload)
            folder = self._measurer.measure(planned, Sending(file, load))
        return self._storage.load(folder)


def predict(
    planned: Iterable[PlannedRun], sending_of: Callable[[str, Load], Sending], profile: Profile
) -> tuple[list[Run], list[str]]:
    """Simulate each combination once.

    Returns:
        The runs, and why others could not be simulated.
    """
    runs: list[Run] = []
    reasons: dict[str, None] = {}
    for one in dict.fromkeys(replace(run, repetition=0) for run in planned):
        sending = sending_of(one.workload, one.load)
        try:
            runs.append(_simulate(one, sending.workload, sending.load, profile))
        except (LoadTestError, ConfigError) as error:
            reasons[f"{one.setup.name} was not simulated: {error}"] = None
    return runs, list(reasons)


def step_seconds(costs: CostModel) -> Callable[[Step], float]:
    """What the costs say of a step in which nobody joins."""
    return lambda step: costs.steps.seconds(StepShape.of_step(step, num_joins=0, num_ordered=0))


def _simulate(planned: PlannedRun, workload: Path, load: Load, profile: Profile) -> Run:
    limits, knobs = profile.configure(planned.setup.options)
    run = simulate(
        read_workload(workload),
        load,
        planned.setup,
        limits=limits,
        knobs=knobs,
        costs=profile.costs,
        name=planned.workload,
    )
    return replace(run, load=planned.load)
