"""What an engine and its client say to each other: plain data, msgpack where it crosses a process.

No reading of a clock is among it but the starts of steps: ages and durations mean the same on every machine.
"""

from __future__ import annotations

from typing import Any

import msgspec

from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.output import RequestOutput, SamplingParams, SchedulerStats, SchedulingParams
from shoal.scheduler.step_record import StepRecord
from shoal.server.engine.events import Seen, UsePolicy, UsesPolicy, Watch
from shoal.server.engine.packing import TokenIds

HEARTBEAT_SECONDS = 0.25


class EngineRequest(msgspec.Struct, frozen=True):
    """A request as an engine takes it.

    Attributes:
        age: seconds since it arrived at the server.
        output_token_ids: tokens that an earlier engine generated already; the request goes on after them.
        num_scored_tokens: prompt tokens that an earlier engine scored already; nothing predicts the first.
        scheduling: what the policy may know of it.
        speculates: whether tokens may be drafted for it.
        end_after: the model is made to end the text with this output token; None leaves the end to it.  The scheduler
            is not told.
        die_after: the engine is made to die when the request has this many output tokens; an injected fault.
        timing: whether the records of its steps are wanted.
        is_bounded: whether it is refused if too many are unfinished; one that waited or has moved was accepted before.
    """

    request_id: str
    prompt_token_ids: TokenIds
    params: SamplingParams
    age: float = 0.0
    output_token_ids: list[int] = []
    num_scored_tokens: int = 1
    scheduling: SchedulingParams = SchedulingParams()
    speculates: bool = True
    end_after: int | None = None
    die_after: int | None = None
    timing: bool = False
    is_bounded: bool = True


class Begin(msgspec.Struct, tag=True):
    """The first command of all, with what `Settings.sections` makes, in plain data."""

    sections: dict[str, Any]


class Submit(msgspec.Struct, tag=True):
    requests: list[EngineRequest]


class Abort(msgspec.Struct, tag=True):
    request_ids: list[str]


class ForgetPrefixes(msgspec.Struct, tag=True):
    """The prefix cache is to be emptied."""


class Stop(msgspec.Struct, tag=True):
    """The engine is to close what it writes, and to end."""


class Loading(msgspec.Struct, tag=True):
    """What the engine does before it is ready, for people."""

    what: str


class Ready(msgspec.Struct, tag=True):
    """The engine has loaded its model and waits for requests.

    Attributes:
        limits: that its scheduler keeps.
        num_parameters: of the model.
        kv_cache_bytes: size of the KV cache.
        backend: what computes, for people.
        warning: what the user should know of the choice of backend, if anything.
        kv_cache_dtype: number format of the KV cache.
        pid: of the process that runs the engine.
    """

    limits: SchedulerConfig
    num_parameters: int
    kv_cache_bytes: int
    backend: str
    warning: str | None
    kv_cache_dtype: str = ""
    pid: int = 0


class StartFailed(msgspec.Struct, tag=True):
    """The engine cannot start, and would not the next time either."""

    message: str
    param: str | None


class News(msgspec.Struct, tag=True):
    """What came of a step, and the record of it if a request in it wants to know.

    While an engine works it sends news at least every `HEARTBEAT_SECONDS`, even empty ones.
    """

    outputs: list[RequestOutput]
    stats: SchedulerStats
    step: StepRecord | None = None


Sendable = Submit | Abort | ForgetPrefixes | Watch | UsePolicy  # while it works
Command = Begin | Sendable | Stop
Report = Loading | Ready | StartFailed | News | Seen | UsesPolicy
