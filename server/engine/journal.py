"""What the API process keeps of each unfinished request."""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec.structs import replace

from shoal.scheduler.explanation import RequestHistory
from shoal.scheduler.output import RequestOutput, TokenLogprobs
from shoal.server.engine.messages import EngineRequest


@dataclass(slots=True)
class Journal:
    """What one request was and what came of it so far: what another engine needs to go on after one that died.

    It is kept here, in the API process.  Times are seconds on the monotonic clock of this process.

    Attributes:
        engine: name of the engine that has the request.
        num_deaths: engines that died with the request since it last made progress.
        gives_way: whether it is of a line of a batch, which ends where others would have to wait.
        finish_reason: why the request ended for the client, "abort" and "error" among the reasons; None before.
        history: how it was served, if it wants to know and has joined a batch.
    """

    request: EngineRequest
    engine: str
    arrival_time: float
    output_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_cached_tokens: int = 0
    queue_time: float = 0.0
    num_accepted_tokens: int = 0
    num_rejected_tokens: int = 0
    num_preemptions: int = 0
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_deaths: int = 0
    gives_way: bool = False
    finish_reason: str | None = None
    history: RequestHistory | None = None

    def resumed(self, now: float, *, is_bounded: bool = False) -> EngineRequest:
        """The request as the next engine takes it.  It makes one engine die, and not those after it."""
        return replace(
            self.request,
            age=now - self.arrival_time,
            output_token_ids=list(self.output_token_ids),
            num_scored_tokens=1 + len(self.prompt_logprobs),
            die_after=None if self.num_deaths else self.request.die_after,
            is_bounded=is_bounded,
        )

    def note(self, output: RequestOutput, now: float) -> None:
        """Take in an output."""
        self.num_deaths = 0
        self.num_preemptions = max(self.num_preemptions, output.num_preemptions)  # a new engine counts from 0
        self.prompt_logprobs += output.prompt_logprobs or ()
        if output.token_ids:
            self.num_accepted_tokens += output.num_accepted_tokens
            self.num_rejected_tokens += output.num_rejected_tokens
            if self.first_token_time is None:
                self.first_token_time = now
                self.queue_time = output.queue_time
                self.num_cached_tokens = output.num_cached_tokens
            self.last_token_time = now
            self.output_token_ids += output.token_ids
