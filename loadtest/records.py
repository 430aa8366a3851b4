"""Plain data: how requests are sent, what was measured of them, and the files that hold both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct, field

from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import ShoalError
from shoal.scheduler.step_record import StepRecord
from shoal.testing import ServerProcess

T = TypeVar("T")


class LoadTestError(ShoalError):
    """A load test, or a file of one, cannot be as it was asked for."""


class Load(Struct, frozen=True, kw_only=True):
    """How requests are sent; without users and without a rate, at the arrival times that the workload has.

    Attributes:
        users: closed loop: number of users, each of whom sends its next request after the answer to the one before.
        think_seconds: closed loop: mean of the pause before each request of a user but its first; exponential.
        rate: open loop: requests a second, whatever the server does.
        share: open loop of a plan: its rate is this share of the capacity, which closed loops are to find.
        burstiness: open loop: squared coefficient of variation of the times between arrivals, which are gamma
            distributed; 1 is a Poisson process.
        seed: of pauses and arrivals.

    Raises:
        LoadTestError: a field is out of range.
    """

    users: int = 0
    think_seconds: float = 0.0
    rate: float = 0.0
    share: float = 0.0
    burstiness: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("users", "think_seconds", "rate", "seed"):
            if not 0 <= getattr(self, name) < inf:
                raise LoadTestError(f"{name} must be a finite number of at least 0, not {getattr(self, name):g}")
        if not 0 < self.burstiness < inf:
            raise LoadTestError(f"burstiness must be a finite number above 0, not {self.burstiness:g}")
        if self.users and self.rate:
            raise LoadTestError(f"a load has either users or a rate, not both: {self.users} and {self.rate:g}")

    def __str__(self) -> str:
        if self.users:
            thinking = f" who think for {self.think_seconds:g} s" if self.think_seconds else ""
            return f"{self.users} user{'s' * (self.users > 1)}{thinking}"
        if self.share:
            return f"{self.share:g} of capacity"
        bursty = f", burstiness {self.burstiness:g}" if self.burstiness != 1 else ""
        return f"{self.rate:g} requests/s{bursty}" if self.rate else "as recorded"


GENERATE = "hf-generate"


class Setup(Struct, frozen=True, kw_only=True):
    """One of the servers that are compared.

    Attributes:
        policy: of our server; or GENERATE, which is no server of ours (`loadtest/generate.py`).
        speculation: method of speculation; "off" for none.
        options: further command-line options of `shoal serve`.
    """

    policy: str
    speculation: str = "off"
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.policy if self.speculation == "off" else f"{self.policy} + {self.speculation}"


class PlannedRun(Struct, frozen=True, kw_only=True):
    """One load on one server.

    Attributes:
        workload: its name.
        repetition: number of the repetition, from 0.
    """

    setup: Setup
    workload: str
    load: Load
    repetition: int = 0

    def __str__(self) -> str:
        server = " ".join([self.setup.name, *self.setup.options])
        return f"{server}, {self.workload}, {self.load}, repetition {self.repetition + 1}"

    @property
    def name(self) -> str:
        """Unique in a comparison, and good for a file."""
        return slug(str(self))


class ServerInfo(Struct, kw_only=True):
    """Of the answer to `GET /server_info`: the server's limits, and all of its settings by section and name."""

    version: str = ""
    model: str = ""
    limits: SchedulerConfig
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, server: ServerProcess) -> ServerInfo:
        """What a server says of itself; raises LoadTestError if that makes no sense."""
        answer = server.fetch("server_info").raise_for_status()
        return decode(answer.content, cls, str(answer.url))

    @property
    def num_engines(self) -> int:
        return int(self.settings.get("engine", {}).get("engines", 1))


class RequestRecord(Struct, kw_only=True, tag="request", tag_field="kind"):
    """One request as its user saw it; times are seconds after the start of the run.

    Attributes:
        engine_id: the id by which the steps of the engine name the request.
        sent_at: when the request was sent; in an open loop, when it was due.
        accepted_at: when the head of the answer came, which the server sends when it has taken the request.
        token_times: when each event of the stream came that carried text or the end.
        num_output_tokens: number of tokens, as the usage of the answer says.
        finished_at: when the stream ended.
        text_hash: hex digest of the text, for comparisons.
        error: why there is no whole answer.
    """

    request_id: str
    client: str = ""
    priority: int = 0
    engine_id: str = ""
    sent_at: float
    accepted_at: float | None = None
    token_times: list[float] = field(default_factory=list)
    finished_at: float | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_accepted_tokens: int = 0
    num_rejected_tokens: int = 0
    num_reasoning_tokens: int = 0
    text_hash: str = ""
    error: str | None = None

    @property
    def is_answered(self) -> bool:
        """Whether the answer came, and came whole."""
        return self.error is None and self.finished_at is not None


class Run(PlannedRun, frozen=False, kw_only=True):  # type: ignore[misc]  # msgspec allows it
    """A run, measured or simulated.

    Attributes:
        server: what the run's server said of itself.
        started_at: start of the run on the clock of the engine.
        requests: in the order in which they were sent.
        steps: steps of the engine with something to compute, on the clock of the run; of several, those of the first.
        other_steps: those of each of the other engines.
        generator_cpu_seconds, api_cpu_seconds, engine_cpu_seconds: processor time of the load generator and of the two
            processes of the server; 0 where it was not measured.
        is_complete: whether all requests were answered; False for what was saved of a run that broke off.
    """

    server: ServerInfo
    started_at: float = 0.0
    requests: list[RequestRecord] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    other_steps: list[list[StepRecord]] = field(default_factory=list)
    generator_cpu_seconds: float = 0.0
    api_cpu_seconds: float = 0.0
    engine_cpu_seconds: float = 0.0
    is_complete: bool = True


# -- files -------------------------------------------------------------------------------------------------------------


def decode(content: bytes, kind: type[T] | Any, place: str) -> T:
    """A value from JSON.

    Raises:
        LoadTestError: the content is not JSON, or a field is wrong; `place` and field are named.
    """
    try:
        value: T = msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ShoalError) as error:
        raise LoadTestError(f"{place}: {error}") from error
    return value


def read_json(path: Path, kind: type[T]) -> T:
    """The value of a file; raises LoadTestError if it cannot be read, or is wrong."""
    return decode(_read(path), kind, str(path))


def read_lines(path: Path, kind: type[T] | Any, *, may_be_cut: bool = False) -> Iterator[T]:
    """The values of a file, one on each line; raises LoadTestError if it cannot be read, or a line of it is wrong.

    Args:
        may_be_cut: whether a last line without its end is left out.
    """
    *lines, last = _read(path).split(b"\n")
    for number, line in enumerate([*lines, last] if last and not may_be_cut else lines, 1):
        yield decode(line, kind, f"{path}, line {number}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LoadTestError(f"{path} cannot be read: {error.strerror}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a file that is whole or not there."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")
    partial.replace(path)


def slug(name: str) -> str:
    """A name that is good for a file."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
