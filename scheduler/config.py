"""The limits that the scheduler keeps, and the knobs of the policies."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite
from typing import Literal

from shoal.scheduler.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits, checked once.

    Attributes:
        num_blocks, block_size: size of the KV cache, in blocks and in tokens per block.
        max_model_len: most tokens of a request, prompt and output together.
        max_num_seqs: most requests in one step.
        max_num_batched_tokens: most tokens in one step, over all requests.
        max_chunk_tokens: most tokens of one request in one step, so that a long prompt does not hold up the others.
        max_num_waiting: most unfinished requests beyond `max_num_seqs`; more are refused.
        enable_prefix_caching: whether blocks are found again by content.
        num_lookahead_tokens: how many tokens beyond the known ones a block table reaches if blocks are to be had, for
            a draft that writes to the KV cache.

    Raises:
        ConfigError: a limit is out of range.
    """

    num_blocks: int
    block_size: int = 16
    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_chunk_tokens: int = 512
    max_num_waiting: int = 1024
    enable_prefix_caching: bool = True
    num_lookahead_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_model_len", "max_num_seqs", "max_chunk_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}", param=name)
        for name in ("max_num_waiting", "num_lookahead_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)}", param=name)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running request can advance by one token in a step",
                param="max_num_batched_tokens",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """The knobs of the policies, each of which reads its own, checked once.

    Attributes:
        ageing_seconds: priority: waiting time that makes up for one level of priority.
        ageing_tokens: sjf: tokens of predicted work that a second of waiting makes up for.
        predictor: sjf: what foretells the length of an output; see `scheduler/policies/predictor.py`.
        prompt_weight, output_weight: fair: what a token of a prompt and an output token count as service.
        fair_lead: fair: weighted tokens by which a client may be ahead of another before it sits out.
        ttft_slo_ms, tpot_slo_ms: deadline: the objectives of requests that name none.
        static_timeout_seconds: static: longest time that a request waits for a batch to become full.

    Raises:
        ConfigError: a knob is out of range.
    """

    ageing_seconds: float = 10.0
    ageing_tokens: float = 20.0
    predictor: Literal["max_tokens", "learned"] = "learned"
    prompt_weight: float = 1.0
    output_weight: float = 2.0
    fair_lead: float = 256.0
    ttft_slo_ms: float = 1000.0
    tpot_slo_ms: float = 100.0
    static_timeout_seconds: float = 0.1

    def __post_init__(self) -> None:
        if self.predictor not in ("max_tokens", "learned"):
            raise ConfigError(f"predictor must be max_tokens or learned, not {self.predictor!r}", param="predictor")
        for knob in fields(self):
            value = getattr(self, knob.name)
            if isinstance(value, int | float) and not (isfinite(value) and value > 0):
                raise ConfigError(f"{knob.name} must be a finite number above 0, not {value}", param=knob.name)
