"""Options of `shoal serve`, as far as they change what is scheduled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from shoal.loadtest.errors import LoadTestError
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.policies import POLICIES, select_knobs

KNOBS: dict[str, Any] = {knob.name: knob.default for kind in POLICIES.values() for knob in fields(kind.Knobs)}
"""The knobs of all policies, by name, with their defaults."""

NAMES = ({field.name for field in fields(SchedulerConfig)} | KNOBS.keys()) - {"num_lookahead_tokens"}
"""Options that change nothing but what is scheduled."""


def apply_options(
    options: Sequence[str], common: Sequence[str], limits: SchedulerConfig, knobs: dict[str, Any]
) -> tuple[SchedulerConfig, dict[str, Any]]:
    """Limits and knobs of a server with these options.

    Args:
        common: options that `limits` and `knobs` are of already; they may stand in `options` again.

    Raises:
        ConfigError: a value is out of range.
        LoadTestError: an option is malformed, or is none of those that change nothing but what is scheduled.
    """
    known = _parse(common)
    given = {name: value for name, value in _parse(options).items() if known.get(name) != value}
    for name in given:
        if name not in NAMES:
            raise LoadTestError(
                f"what --{name.replace('_', '-')} does to the costs of steps is not known: profile a server with it"
            )
    limits_given = _read_all({field.name: getattr(limits, field.name) for field in fields(limits)}, given)
    changed = replace(limits, **limits_given)
    if "max_num_seqs" in given and "num_blocks" not in given | known:
        changed = replace(changed, num_blocks=_plan_blocks(limits, changed))
    return changed, check_knobs(knobs | _read_all(knobs, given))


def check_knobs(knobs: dict[str, Any]) -> dict[str, Any]:
    """The knobs, which are those of all policies.

    Raises:
        ConfigError: one of them is out of range.
    """
    for policy in POLICIES:
        select_knobs(policy, knobs)
    return knobs


def _plan_blocks(before: SchedulerConfig, after: SchedulerConfig) -> int:
    """As the server does: room for `max_num_seqs` requests of any length, or what memory there is."""
    per_request = -(-after.max_model_len // after.block_size)
    wanted = after.max_num_seqs * per_request
    is_short = before.num_blocks < before.max_num_seqs * per_request
    return min(wanted, before.num_blocks) if is_short else wanted


def _parse(options: Sequence[str]) -> dict[str, str]:
    """Values by name: `--name value`, `--name=value`, `--name` and `--no-name`."""
    values: dict[str, str] = {}
    place = 0
    while place < len(options):
        option, equals, value = options[place].partition("=")
        if not option.startswith("--"):
            raise LoadTestError(f"unexpected argument {option!r}: options of the server are --name value")
        place += 1
        if not equals and place < len(options) and not options[place].startswith("--"):
            value, place = options[place], place + 1
        elif not equals:
            option, value = option.replace("--no-", "--", 1), str(not option.startswith("--no-")).lower()
        values[option.removeprefix("--").replace("-", "_")] = value
    return values


def _read_all(before: dict[str, Any], given: dict[str, str]) -> dict[str, Any]:
    return {name: _read(name, given[name], value) for name, value in before.items() if name in given}


def _read(name: str, text: str, before: Any) -> Any:
    """A value of the type of the one before."""
    if isinstance(before, bool) and text in ("true", "false"):
        return text == "true"
    try:
        if not isinstance(before, bool):
            return type(before)(text)
    except ValueError:
        pass
    raise LoadTestError(f"--{name.replace('_', '-')} must be of type {type(before).__name__}, not {text!r}")
