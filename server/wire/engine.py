"""What the page asks of the engine, and what it is told: loads, and the tokens of requests."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from shoal.server.wire.body import Body

MAX_SINGLE_STEPS = 1000
MAX_USERS, MAX_LOAD_SECONDS = 128, 120

WorkloadName = Literal["chat", "mixed", "shared", "long"]
LoadState = Literal["running", "finished", "cancelled", "failed"]
MachineName = Literal["auto", "a100", "h100", "h200", "b200", "mi300x", "l4", "l40s", "rtx3090", "rtx4090"]
MAX_BATCH, MAX_RANKS = 1 << 16, 4096

_Ranks = Annotated[int, Meta(ge=1, le=MAX_RANKS)]


class EngineQuery(Body):
    """GET /v1/engine/events: the number of the engine, where there are several."""

    engine: Annotated[int, Meta(ge=0)] = 0


class StepsBody(Body):
    """POST /v1/engine/steps."""

    num_steps: Annotated[int, Meta(ge=1, le=MAX_SINGLE_STEPS)] = 200


class LoadBody(Body):
    """POST /v1/engine/loads."""

    workload: WorkloadName = "chat"
    users: Annotated[int, Meta(ge=1, le=MAX_USERS)] = 16
    seconds: Annotated[float, Meta(ge=1, le=MAX_LOAD_SECONDS)] = 15.0
    policy: str | None = None
    seed: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0


class PlanBody(Body):
    """POST /v1/engine/plan."""

    config: dict[str, Any] | None = None
    machine: MachineName = "auto"
    context: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    batch: Annotated[int, Meta(ge=1, le=MAX_BATCH)] = 64
    tp: _Ranks = 1
    ep: _Ranks = 1
    pp: _Ranks = 1


class PlanTable(Struct):
    """A table for people: the names of its columns, and the texts of its cells row by row."""

    title: str
    columns: list[str]
    rows: list[list[str]]


class Planned(Struct):
    """What a model costs on a machine.

    Attributes:
        plan: all numbers, as `shoal plan --json` prints them.
        tables: what `shoal plan` prints without it.
    """

    plan: dict[str, Any]
    tables: list[PlanTable]


class RequestTokens(Struct):
    """The tokens of an unfinished request as texts, those of the prompt first."""

    request_id: str
    num_prompt_tokens: int
    tokens: list[str]


class Times(Struct):
    """Milliseconds that half of all, and that nineteen in twenty, do not exceed."""

    p50: float
    p95: float


class Load(Struct, kw_only=True):
    """A load, as it is so far.

    Attributes:
        policy: by which the engine schedules.
        elapsed: seconds since it began; requests that are under way at the end are ended.
        num_requests: that were answered in full; `num_failed` were refused, or ended with an error.
        ttft, itl, e2e: of these requests; None before the first.
        tokens_per_second: output tokens, of all requests.
        timeline: output tokens in each half second.
        problem: why it ended early, or what is wrong with what it measured.
    """

    id: str
    state: LoadState
    workload: WorkloadName
    users: int
    seconds: float
    policy: str
    started: int
    elapsed: float = 0.0
    num_requests: int = 0
    num_failed: int = 0
    num_output_tokens: int = 0
    tokens_per_second: float = 0.0
    ttft: Times | None = None
    itl: Times | None = None
    e2e: Times | None = None
    timeline: list[int] = field(default_factory=list)
    problem: str | None = None


class Loads(Struct):
    """The loads that are remembered, the newest first; and the policies under which one may be run."""

    data: list[Load]
    policies: list[str]
    max_users: int = MAX_USERS
    max_seconds: float = MAX_LOAD_SECONDS
