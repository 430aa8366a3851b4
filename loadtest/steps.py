"""The steps of an engine, read from its trace."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Step:
    """One step, from the trace of a server or of its twin.

    Attributes:
        start, seconds: on the clock of the engine (monotonic), or of the run; from before `schedule` to after `update`.
        execute_seconds: of them, in the executor.
        rows: the requests' shares: request id, row in the batch (a request keeps it until it leaves), scheduled tokens,
            drafted ones among them, whether it samples, and whether it is a padding row.
        num_waiting: requests that wait after the step was scheduled.
        num_blocks, num_used_blocks: of the KV cache: in all, and owned by requests.
        num_kv_tokens: tokens whose keys and values stand in the owned blocks, shared ones counted once.
        num_pairs: pairs of query and key that attention computes.
        num_preemptions: in this step.
    """

    start: float
    seconds: float
    execute_seconds: float
    rows: list[Row]
    num_waiting: int
    num_blocks: int
    num_used_blocks: int
    num_kv_tokens: int
    num_pairs: int
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class Row:
    """A request's share of a step."""

    request_id: str
    row: int
    num_tokens: int
    num_spec_tokens: int
    samples: bool
    is_padding: bool


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request's way through the engine, on the clock of its steps; times are None where it did not get so far.

    Attributes:
        arrived_at: when the API process took it.
        joined_at: start of its first step.
        left_at: end of its last one.
    """

    request_id: str
    arrived_at: float
    joined_at: float | None
    left_at: float | None


def read_trace(path: Path) -> tuple[list[Step], dict[str, EngineRequest]]:
    """Read the Chrome trace that `shoal serve --trace` wrote, whole or broken off after any event."""
    ...
