"""What was measured: the requests of a run as their users saw them, and the run's steps as its engine saw them."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.loadtest.steps import EngineRequest, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How requests are sent.

    Attributes:
        users: closed loop: so many users, each of whom sends its next request `think_seconds` (the mean of an
            exponential distribution; 0 is at once) after the answer to the one before; 0 in an open loop.
        rate: open loop: requests a second, never held back by the server; 0 in a closed loop.
        burstiness: open loop: squared coefficient of variation of the times between arrivals, which are gamma
            distributed; 1 is a Poisson process.
        seed: of think times and arrivals.
    """

    users: int = 0
    think_seconds: float = 0.0
    rate: float = 0.0
    burstiness: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One of the servers that are compared.

    Attributes:
        speculation: method, "off" for none.
        options: further command-line options of `shoal serve`, the same for all that are compared.
    """

    policy: str
    speculation: str = "off"
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.policy if self.speculation == "off" else f"{self.policy} + {self.speculation}"


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request as its user saw it; times are seconds after the start of the run.

    Attributes:
        server_id: the id of the answer, by which the steps name the request.
        sent_at: when it was sent; in an open loop, when it was due.
        token_times: when each event of the stream that carried text or an end came.
        num_output_tokens: as the server's usage says.
        finished_at: when the stream ended.
        text_hash: hex digest of the text, for comparisons.
        priority: that of the workload's request.
        error: why there is no (whole) answer.
    """

    request_id: str
    client: str = ""
    server_id: str = ""
    sent_at: float
    token_times: list[float] = field(default_factory=list)
    finished_at: float | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_accepted_tokens: int = 0
    num_rejected_tokens: int = 0
    text_hash: str = ""
    error: str | None = None
    priority: int = 0


@dataclass(slots=True, kw_only=True)
class Run:
    """One load on one server, measured or simulated.

    Attributes:
        repetition: which of the repetitions of the same.
        requests: in the order in which they were sent.
        steps: of the engine; its clock is that of the run, so that times can be compared.
        engine_requests: when each was queued, joined and left, by `server_id`.
        block_size: of the engine's KV cache.
        generator_cpu_seconds, api_cpu_seconds, engine_cpu_seconds: processor time of the load generator and of the
            server's two processes; 0 where it was not measured.
        is_complete: whether all requests were sent and answered; False for what was saved of a run that broke off.
    """

    setup: Setup
    workload: str
    load: Load
    repetition: int = 0
    requests: list[RequestRecord]
    steps: list[Step] = field(default_factory=list)
    engine_requests: dict[str, EngineRequest] = field(default_factory=dict)
    block_size: int = 16
    generator_cpu_seconds: float = 0.0
    api_cpu_seconds: float = 0.0
    engine_cpu_seconds: float = 0.0
    is_complete: bool = True
