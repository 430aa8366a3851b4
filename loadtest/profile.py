"""A short series of runs of the real engine, and what the digital twin keeps of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from shoal.loadtest.costs import CostModel, read_object
from shoal.loadtest.errors import LoadTestError, WorkloadError
from shoal.loadtest.fit import fit
from shoal.loadtest.records import Load, Run, Setup
from shoal.loadtest.server_options import KNOBS, apply_options, check_knobs
from shoal.loadtest.workload import WorkloadRequest, read_workload, write_workload
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import ConfigError

FILE = "profile.json"
_LIMITS = [field.name for field in fields(SchedulerConfig)]

Measure = Callable[[Sequence[WorkloadRequest], Load, Setup], Run]
Config = TypeVar("Config")
MakeWorkload = Callable[[str, int, int], Sequence[WorkloadRequest]]  # name, number of requests, seed


@dataclass(frozen=True, slots=True)
class Stretch:
    """One run of the series: a closed loop without time to think, or an open one if there are no users."""

    workload: str
    num_requests: int
    users: int
    policy: str = "fcfs"
    options: tuple[str, ...] = ()
    rate: float = 0.0


SERIES = (
    Stretch("chat", 8, 1),
    Stretch("chat", 12, 2),
    Stretch("chat", 64, 8),
    Stretch("chat", 256, 32),
    Stretch("chat", 256, 64),
    Stretch("code", 64, 16),
    Stretch("chat", 64, 32, "static"),
    Stretch("chat", 64, 48, "sjf", ("--max-num-seqs", "16")),
    Stretch("chat", 32, 0, rate=16.0),
)
"""Batches of 1 to 64 rows (as a run ends, it passes through all below its own), prompts in chunks of all sizes, long
contexts and found prefixes, rows that are padding, requests that wait to be put in order, and requests that come when
they are due."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What the twin must know of a server.

    Attributes:
        model: its name.
        options: that all its servers were started with.
        versions: of what was measured, for people.
    """

    model: str
    options: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    limits: SchedulerConfig
    knobs: dict[str, Any]
    costs: CostModel

    def configure(self, options: Sequence[str]) -> tuple[SchedulerConfig, dict[str, Any]]:
        """Limits and knobs of a server that was started with these options of `shoal serve`.

        Raises:
            LoadTestError: one of them is wrong, or changes more than what is scheduled and was not profiled with.
        """
        return apply_options(options, self.options, self.limits, self.knobs)


def measure_series(
    measure: Measure, make_workload: MakeWorkload, options: Sequence[str] = (), series: Iterable[Stretch] = SERIES
) -> Iterator[Run]:
    """The runs of the series, each measured when it is asked for.

    Raises:
        LoadTestError: a server failed.
    """
    for stretch in series:
        workload = make_workload(stretch.workload, stretch.num_requests, 0)
        setup = Setup(policy=stretch.policy, options=(*options, *stretch.options))
        yield measure(workload, Load(users=stretch.users, rate=stretch.rate), setup)


def make_profile(
    runs: Sequence[Run],
    *,
    model: str,
    limits: SchedulerConfig,
    knobs: dict[str, Any],
    options: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
) -> Profile:
    """Fit the costs to the runs of the series, which may have been run several times.

    Args:
        limits, knobs: those that servers with `options` have; how many blocks there are, their traces say.

    Raises:
        LoadTestError: too little was measured.
    """
    num_blocks = max((step.num_blocks for run in runs for step in run.steps), default=limits.num_blocks)
    return Profile(
        model=model,
        options=tuple(options),
        versions=dict(versions or {}),
        limits=replace(limits, num_blocks=num_blocks),
        knobs=knobs,
        costs=fit(runs),
    )


# -- the folder --------------------------------------------------------------------------------------------------------


def write_profile(folder: Path, profile: Profile, workloads: Mapping[str, Sequence[WorkloadRequest]]) -> None:
    """Save a profile, and beside it workloads in the tokens of its model, so that simulations need no server."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, requests in workloads.items():
        write_workload(_workload_file(folder, name), requests)
    saved = asdict(profile) | {"costs": profile.costs.to_json()}
    (folder / FILE).write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")


def read_profile(folder: Path) -> Profile:
    """Read what `write_profile` saved.

    Raises:
        LoadTestError: there is none, or it is broken; names the field.
    """
    path = folder / FILE
    try:
        return _read(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise LoadTestError(f"there is no profile in {folder}: {FILE} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise LoadTestError(f"{path} is not JSON: {error}") from error
    except LoadTestError as error:
        raise LoadTestError(f"{path} is broken: {error}") from error


def _read(saved: object) -> Profile:
    values = read_object(saved, "profile", [one.name for one in fields(Profile)])
    versions = read_object(values["versions"], "versions")
    return Profile(
        model=_read_text(values["model"], "model"),
        options=tuple(_read_texts(values["options"], "options")),
        versions={name: _read_text(text, f"versions.{name}") for name, text in versions.items()},
        limits=_read_config(lambda read: SchedulerConfig(**read), values["limits"], "limits", _LIMITS),
        knobs=_read_config(check_knobs, values["knobs"], "knobs", list(KNOBS)),
        costs=CostModel.from_json(values["costs"]),
    )


def read_profiled_workload(folder: Path, name: str, num_requests: int | None = None) -> list[WorkloadRequest]:
    """The first so many requests of a workload that was saved with a profile, or all.

    Raises:
        WorkloadError: it was not saved, or has fewer.
    """
    path = _workload_file(folder, name)
    if not path.exists():
        known = sorted(file.stem.removeprefix("workload-") for file in folder.glob(_workload_file(Path(), "*").name))
        raise WorkloadError(f"the profile in {folder} has no workload {name!r}; it has {', '.join(known) or 'none'}")
    requests = read_workload(path)
    if num_requests is not None and num_requests > len(requests):
        raise WorkloadError(f"the profile's workload {name!r} has {len(requests)} requests, fewer than {num_requests}")
    return requests[:num_requests]


def _workload_file(folder: Path, name: str) -> Path:
    return folder / f"workload-{name}.jsonl"


def _read_config(make: Callable[[dict[str, Any]], Config], value: object, name: str, keys: Sequence[str]) -> Config:
    try:
        return make(read_object(value, name, keys))
    except ConfigError as error:
        raise LoadTestError(f"{name}.{error.message}") from error
    except TypeError as error:
        raise LoadTestError(f"{name} has a value of the wrong type: {error}") from error


def _read_texts(value: object, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise LoadTestError(f"{name} must be a list of strings, not {value!r:.40}")
    return value


def _read_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise LoadTestError(f"{name} must be a string, not {value!r:.40}")
    return value
