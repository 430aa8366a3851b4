"""What may be configured: how a setting is declared and checked, and the limits that the scheduler keeps."""

from __future__ import annotations

import operator
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import lru_cache
from math import isfinite
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from shoal.scheduler.errors import ConfigError


def setting(
    default: Any = MISSING,
    *,
    help: str,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    pattern: str | None = None,
) -> Any:
    """A field of a `Config`: its default, what it means, and its range (for text, what it must match).

    Nothing else needs to know of a setting: `shoal.toml`, environment, command line and help are made of its field.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "pattern": pattern}
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True, kw_only=True)
class Config:
    """A frozen configuration, checked once.

    Raises:
        ConfigError: a setting is out of its range, or none of its choices.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for each in fields(self):
            check_setting(each, hints[each.name], getattr(self, each.name))

    @classmethod
    def select(cls, values: Mapping[str, Any]) -> Self:
        """The configuration with those of these values that are its settings; the others have their defaults."""
        return cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})


def check_setting(declared: Field[Any], hint: Any, value: Any) -> None:
    """Refuse a value that is out of the setting's range, or none of its choices.

    Raises:
        ConfigError: naming the setting, its limit, and the value.
    """
    fault = _fault(declared.metadata, get_args(hint) if get_origin(hint) is Literal else None, value)
    if fault:
        raise ConfigError(f"{declared.name} must be {fault}, not {value!r}", param=declared.name)


def _fault(limits: Mapping[str, Any], choices: tuple[Any, ...] | None, value: Any) -> str | None:
    """What the value should be, if it is not."""
    if choices is not None:
        return None if value in choices else f"one of {', '.join(map(str, choices))}"
    if isinstance(value, str):
        pattern = limits["pattern"]
        return f"text like {pattern}" if pattern is not None and not re.fullmatch(pattern, value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not isfinite(value):
        return "a finite number"
    bounds = (("at least", operator.ge), ("above", operator.gt), ("at most", operator.le))
    found = [(words, limits[words.replace(" ", "_")], holds) for words, holds in bounds]
    return next(
        (f"{words} {limit}" for words, limit, holds in found if limit is not None and not holds(value, limit)), None
    )


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits(Config):
    """The limits of a step and of the queue, which a user may set."""

    max_num_seqs: int = setting(64, at_least=1, help="Most requests in one step.")
    max_num_batched_tokens: int = setting(512, at_least=1, help="Most tokens in one step, over all requests.")
    max_chunk_tokens: int = setting(
        512, at_least=1, help="Most tokens of one request in one step, so that a long prompt does not delay the others."
    )
    target_step_ms: float = setting(
        150.0,
        at_least=0,
        help="Wanted length of steps in which requests decode: prompts beside them are cut so that it is kept; 0 for "
        "as many tokens as the other limits allow.",
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


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that see the same positions, so that one block table serves them all.

    Attributes:
        window: positions that a query sees, its own included; 0 for all before it.
        chunk: a query sees its own run of this number of positions only, counted from the start; 0 for all.
    """

    window: int = 0
    chunk: int = 0

    @property
    def sees_all(self) -> bool:
        return not (self.window or self.chunk)

    def first_seen(self, position: int) -> int:
        """The first position that a query at `position` sees; later queries see none before it."""
        run = position // self.chunk * self.chunk if self.chunk else 0
        return max(run, position - self.window + 1) if self.window else run

    def num_unseen(self, num_computed_tokens: int, block_size: int) -> int:
        """Leading blocks that no query sees any more; the last computed token may be computed again, as padding."""
        return self.first_seen(max(num_computed_tokens - 1, 0)) // block_size

    def most_blocks(self, num_tokens: int, block_size: int, max_chunk_tokens: int) -> int:
        """Most blocks that a request of `num_tokens` tokens owns at once, if unseen ones are given back."""
        num_blocks = -(-num_tokens // block_size)
        if self.sees_all:
            return num_blocks
        # A step computes a chunk, whose first query sees a window that may begin anywhere in a block.
        span = min(size for size in (self.window, self.chunk) if size) + max_chunk_tokens
        return min(num_blocks, -(-(span - 1) // block_size) + 1)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig(SchedulerLimits):
    """All limits that the scheduler keeps: those that a user sets, and those of the model and of its memory."""

    num_blocks: int = setting(at_least=1, help="Blocks of the KV cache.")
    block_size: int = setting(16, at_least=1, help="Tokens per block.")
    cache_groups: tuple[CacheGroup, ...] = setting((CacheGroup(),), help="What the layers of each block table see.")
    max_model_len: int = setting(at_least=1, help="Most tokens of a request, prompt and output together.")
    enable_prefix_caching: bool = setting(True, help="Whether prompts that start alike share their blocks.")
    num_lookahead_tokens: int = setting(
        0,
        at_least=0,
        help="How far a block table reaches beyond the known tokens if there are blocks, for a draft model.",
    )

    def most_blocks(self, num_tokens: int, num_computed_tokens: int = 0) -> int:
        """Most blocks that a request owns at once, from that number of computed tokens on to `num_tokens`."""
        size, num_blocks = self.block_size, -(-num_tokens // self.block_size)
        return sum(
            min(
                num_blocks - group.num_unseen(num_computed_tokens, size),
                group.most_blocks(num_tokens, size, self.max_chunk_tokens),
            )
            for group in self.cache_groups
        )

    @property
    def capacity(self) -> int:
        """The most tokens that a request may have computed in the whole KV cache, and in its context."""
        return _capacity(self)


@lru_cache
def _capacity(config: SchedulerConfig) -> int:
    """It is asked for with each request."""
    return bisect_right(range(config.max_model_len + 1), config.num_blocks, key=config.most_blocks) - 1
