"""A profile: what the digital twin must know of a server, from a series of short runs of it."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentError, ArgumentParser, BooleanOptionalAction
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from shoal.loadtest.costs import CostModel
from shoal.loadtest.records import Load, LoadTestError, PlannedRun, ServerInfo, Setup, read_json
from shoal.scheduler.config import SchedulerConfig

FILE = "profile.json"

# Of the settings that may change the costs of steps, those that do not: simulations have the limits of their server.
_FREE_SETTINGS = {limit.name for limit in fields(SchedulerConfig)} | {"memory_mib", "trace"}

FCFS, STATIC = Setup(policy="fcfs"), Setup(policy="static")
SERIES = {
    PlannedRun(setup=FCFS, workload="chat", load=Load(users=1)): 8,
    PlannedRun(setup=FCFS, workload="chat", load=Load(users=8)): 64,
    PlannedRun(setup=FCFS, workload="chat", load=Load(users=32)): 256,
    PlannedRun(setup=FCFS, workload="chat", load=Load(users=64)): 256,
    PlannedRun(setup=FCFS, workload="code", load=Load(users=16)): 64,
    PlannedRun(setup=FCFS, workload="agent", load=Load(users=16)): 64,
    PlannedRun(setup=STATIC, workload="chat", load=Load(users=32)): 64,
}
"""The runs of a profile, and how many requests of the workload each sends at most, for each engine.

They show batches of 1 to 64 rows (a run passes through all smaller ones as it ends), prompts in chunks of all sizes,
long contexts, found prefixes and rows that share one, and padding rows.
"""


class Profile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the twin must know of a server.

    Attributes:
        server: what it said of itself.
        options: with which it was started.
        versions: of the machine and the programs, for people.
    """

    server: ServerInfo
    options: tuple[str, ...] = ()
    versions: dict[str, str] = {}
    costs: CostModel

    def check(self, server: ServerInfo) -> None:
        """Raise LoadTestError if the steps of a server may cost something else."""
        ours, theirs = _costly_settings(self.server), _costly_settings(server)
        for name in ours | theirs:
            if (our := ours.get(name)) != (their := theirs.get(name)):
                raise LoadTestError(
                    f"its {name} is {their!r}, the profile's is {our!r}: profile a server with the same"
                )

    def server_with(self, options: Sequence[str]) -> ServerInfo:
        """What a server with these options of `shoal serve` would say of itself.

        Raises:
            ConfigError: a limit is out of range.
            LoadTestError: an option is malformed, or changes the costs of steps and was not profiled with.
        """
        before, scheduling = self.server.limits, self.server.settings["scheduler"]
        known = scheduling | {name: value for name, value in vars(before).items() if name != "cache_groups"}
        given, others = _parse(options, known)
        if others not in ([], _parse(self.options, known)[1]):
            raise LoadTestError(f"how {' '.join(others)} changes the costs is unknown: profile a server with it")
        if "max_num_seqs" in given and not given.get("num_blocks", self.server.settings["cache"].get("num_blocks")):
            # As the server does: blocks for `max_num_seqs` requests of any length, or as many as the memory holds.
            per_request = before.most_blocks(before.max_model_len)
            wanted = given["max_num_seqs"] * per_request
            is_tight = before.num_blocks < before.max_num_seqs * per_request
            given["num_blocks"] = min(wanted, before.num_blocks) if is_tight else wanted
        limits = SchedulerConfig.select(vars(before) | given)
        scheduling = {name: given.get(name, value) for name, value in scheduling.items()}
        return replace(self.server, limits=limits, settings=self.server.settings | {"scheduler": scheduling})


def _costly_settings(server: ServerInfo) -> dict[str, Any]:
    """The settings that may change the costs of steps, by name."""
    sections = server.settings.get("engine", {}) | server.settings.get("cache", {})
    return {"model": server.model} | {name: sections[name] for name in sections.keys() - _FREE_SETTINGS}


def read_profile(folder: Path) -> Profile:
    """Read the profile that was saved in a folder.

    Raises:
        LoadTestError: there is none, or a field of it is missing, unknown or wrong; names the field.
    """
    path = folder / FILE
    if not path.exists():
        raise LoadTestError(f"there is no profile in {folder}: {FILE} is missing; `shoal profile` takes one")
    return read_json(path, Profile)


def _parse(options: Sequence[str], known: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values of the options that are known, by name and of the type that `known` has, and the other words."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, argument_default=SUPPRESS, exit_on_error=False)
    for name, value in known.items():
        kind: dict[str, Any] = {"action": BooleanOptionalAction} if isinstance(value, bool) else {"type": type(value)}
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, **kind)
    try:
        given, others = parser.parse_known_args([word for option in options for word in option.split("=", 1)])
    except ArgumentError as error:
        raise LoadTestError(str(error)) from error
    return vars(given), others
