"""What may be configured: how a setting is declared and checked, and the limits that the scheduler keeps."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from math import isfinite
from typing import Any, Literal, get_args, get_origin, get_type_hints

from shoal.scheduler.errors import ConfigError


def setting(
    default: Any = MISSING,
    *,
    help: str,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A field of a `Config`: its default, what it means, and its range.

    Nothing else needs to know of a setting: `shoal.toml`, environment, command line and help are made of its field.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most}
    return field(default=default, metadata={"help": help, **bounds})


@dataclass(frozen=True, kw_only=True)
class Config:
    """A frozen configuration, checked once.

    Raises:
        ConfigError: a setting is out of its range, or none of its choices.
    """

    def __post_init__(self) -> None:
        choices = _choices(type(self))
        for each in fields(self):
            _check(each.name, getattr(self, each.name), choices.get(each.name), each.metadata)


def _check(name: str, value: Any, choices: tuple[Any, ...] | None, bounds: Any) -> None:
    if choices is not None:
        if value not in choices:
            raise ConfigError(f"{name} must be {' or '.join(map(str, choices))}, not {value!r}", param=name)
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    at_least, above, at_most = (bounds.get(key) for key in ("at_least", "above", "at_most"))
    if not isfinite(value):
        raise ConfigError(f"{name} must be a finite number, not {value}", param=name)
    if at_least is not None and value < at_least:
        raise ConfigError(f"{name} must be at least {at_least}, not {value}", param=name)
    if above is not None and value <= above:
        raise ConfigError(f"{name} must be above {above}, not {value}", param=name)
    if at_most is not None and value > at_most:
        raise ConfigError(f"{name} must be at most {at_most}, not {value}", param=name)


def _choices(kind: type[Config]) -> dict[str, tuple[Any, ...]]:
    """The values that a setting may have, by its name, where its type lists them."""
    hints = get_type_hints(kind)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits(Config):
    """The limits of a step and of the queue, which a user may set."""

    max_num_seqs: int = setting(64, at_least=1, help="Most requests in one step.")
    max_num_batched_tokens: int = setting(512, at_least=1, help="Most tokens in one step, over all requests.")
    max_chunk_tokens: int = setting(
        512, at_least=1, help="Most tokens of one request in one step, so that a long prompt does not delay the others."
    )
    max_num_waiting: int = setting(
        1024, at_least=0, help="Most unfinished requests beyond max_num_seqs; more are refused with HTTP 429."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running request can advance by one token in a step",
                param="max_num_batched_tokens",
            )


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig(SchedulerLimits):
    """All limits that the scheduler keeps: those that a user sets, and those of the model and of its memory."""

    num_blocks: int = setting(at_least=1, help="Blocks of the KV cache.")
    block_size: int = setting(16, at_least=1, help="Tokens per block.")
    max_model_len: int = setting(at_least=1, help="Most tokens of a request, prompt and output together.")
    enable_prefix_caching: bool = setting(True, help="Whether prompts that start alike share their blocks.")
    num_lookahead_tokens: int = setting(
        0,
        at_least=0,
        help="How far a block table reaches beyond the known tokens if there are blocks, for a draft model.",
    )
