"""A comparison: all runs of a plan, one after the other, each checked against the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from shoal.loadtest.errors import LoadTestError
from shoal.loadtest.metrics import is_answered, summarize
from shoal.loadtest.plan import Experiment, Plan, PlannedRun, interleave, open_loop
from shoal.loadtest.records import Load, Run, Setup
from shoal.loadtest.report_data import load_name, problems
from shoal.loadtest.storage import Storage
from shoal.loadtest.workload_files import Sending


class Measure(Protocol):
    """Measures a run into a folder: `Measurer.measure`, or a fake."""

    def __call__(self, planned: PlannedRun, sending: Sending, observe: Callable[[int], None]) -> Path: ...


class Progress(Protocol):
    """Is told how far a comparison is."""

    def expect(self, num_runs: int) -> None:
        """So many runs more are planned."""

    def begin(self, planned: PlannedRun) -> None: ...

    def observe(self, num_requests: int) -> None:
        """So many requests of the run have ended."""

    def end(self) -> None: ...


class SameWork:
    """Compares the answers of all runs of a workload, request by request, with those of its first run."""

    def __init__(self) -> None:
        self._answers: dict[tuple[str, str], tuple[int, str]] = {}
        self._differing: dict[str, dict[str, None]] = {}
        self.complaints: list[str] = []

    def add(self, run: Run, name: str) -> None:
        """Args:
        name: of the run, for the complaint.
        """
        found = []
        for record in filter(is_answered, run.requests):
            answer = record.num_output_tokens, record.text_hash
            if self._answers.setdefault((run.workload, record.request_id), answer) != answer:
                found.append(record.request_id)
        if found:
            self._differing.setdefault(run.workload, {}).update(dict.fromkeys(found))
            self.complaints.append(
                f"{name}: {len(found)} answers differ from those of the first run of {run.workload}: {_few(found)}"
            )

    @property
    def differing(self) -> dict[str, list[str]]:
        """By workload, the requests whose answers were not all the same."""
        return {workload: list(found) for workload, found in self._differing.items()}


@dataclass(kw_only=True)
class Results:
    """What a comparison came to.

    Attributes:
        runs: those that were measured, broken-off ones too, in the order in which they ran, and their folders.
        failures: servers that died, and what could not be run, in words.
        incomplete: what is missing of runs that broke off or had errors, in words.
        same_work: whether all did the same.
    """

    runs: dict[PlannedRun, Path] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    same_work: SameWork = field(default_factory=SameWork)

    @property
    def complaints(self) -> list[str]:
        """All that must not be overlooked; empty if the comparison went well."""
        return self.failures + self.incomplete + self.same_work.complaints


class Comparison:
    """Carries a plan out.

    A server that does not start is not tried again: its setup is passed over from there on.  One that dies in the
    middle, or a load generator that fails there, costs this run only.  All of these are failures of the comparison,
    which goes on with the next run.
    """

    def __init__(
        self,
        plan: Plan,
        storage: Storage,
        measure: Measure,
        sending: Callable[[str, Load], Sending],
        progress: Progress,
    ) -> None:
        self._plan = plan
        self._storage = storage
        self._measure = measure
        self._sending = sending
        self._progress = progress
        self._results = Results()
        self._given_up: set[Setup] = set()
        self._request_rates: defaultdict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(list)

    def run(self) -> Results:
        """Measure all that is not yet in the storage."""
        experiments = self._plan.experiments
        self._run_all(list(interleave(experiments, lambda experiment: experiment.loads)))
        self._run_all(list(interleave(experiments, self._loads_by_share)))
        return self._results

    def _run_all(self, runs: Sequence[PlannedRun]) -> None:
        self._progress.expect(len(runs))
        for planned in runs:
            self._progress.begin(planned)
            folder = self._storage.find(planned) or self._run_one(planned)
            if folder is not None:
                self._take(planned, folder)
            self._progress.end()

    def _run_one(self, planned: PlannedRun) -> Path | None:
        """The folder of what was measured, if anything was."""
        if planned.setup in self._given_up:
            return None
        sending = self._sending(planned.workload, planned.load)
        try:
            return self._measure(planned, sending, self._progress.observe)
        except LoadTestError as error:
            broken_off = self._storage.find(planned, is_complete=False)
            consequence = "" if broken_off else "; further runs of this setup are left out"
            self._results.failures.append(f"{describe(planned)}: {error}{consequence}")
        if broken_off is None:
            self._given_up.add(planned.setup)
        return broken_off

    def _take(self, planned: PlannedRun, folder: Path) -> None:
        run = self._storage.load_requests(folder)
        self._results.runs[planned] = folder
        self._results.same_work.add(run, describe(planned))
        if not run.is_complete:
            self._results.incomplete += problems(self._storage.load(folder))
        elif planned.load.users:
            key = planned.workload, planned.setup.options
            self._request_rates[key].append(summarize(run, self._plan.slo).request_rate)

    def _loads_by_share(self, experiment: Experiment) -> list[Load]:
        """The open loops of an experiment; none if no closed loop of its workload could be measured.

        The share of one client's requests is of the whole workload's rate.
        """
        whole = experiment.workload.partition(":")[0]
        rates = self._request_rates[whole, experiment.setups[0].options]
        if experiment.shares and not rates:
            self._results.failures.append(f"{experiment.workload}: nothing to take shares of, so no open loops")
            return []
        # Three digits, so that a name says all of a rate.
        shares = [float(f"{share * max(rates):.3g}") for share in experiment.shares]
        return [open_loop(rate, seed=self._plan.seed) for rate in dict.fromkeys(shares)]


def describe(planned: PlannedRun) -> str:
    """A run in words."""
    load = load_name(planned.load)
    return f"{planned.setup.name}, {planned.workload}, {load}, repetition {planned.repetition + 1}"


def _few(names: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
