"""The steps of an engine, read from its trace."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from shoal.loadtest.errors import TraceError
from shoal.scheduler.step_record import StepRecord


@dataclass(frozen=True, slots=True)
class Step:
    """One step, from the trace of a server or of its twin.

    Attributes:
        start, seconds: on the clock of the engine (monotonic), or of the run; from before `schedule` to after `update`.
        execute_seconds: of them, in the executor.
        rows: the requests' shares, at least one.
        num_waiting: requests that wait after the step was scheduled.
        num_blocks, num_used_blocks: of the KV cache: in all, and owned by requests.
        num_kv_tokens: tokens whose keys and values stand in the owned blocks, shared ones counted once.
        num_pairs: pairs of query and key that attention computes.
        num_keys: keys that the rows see, each row's counted once.
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
    num_keys: int
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class Row:
    """A request's share of a step.

    Attributes:
        request_id: that of the answer, for requests of one prompt and one choice; see `answer_id`.
        row: in the batch; a request keeps it until it leaves.
        num_tokens: scheduled ones.
        num_spec_tokens: drafted ones among them.
        samples: whether the next token is chosen.
        is_padding: whether the request has ended and its row is computed for nothing.
    """

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
        left_at: end of its last one, a padding row's included.
    """

    request_id: str
    arrived_at: float
    joined_at: float | None
    left_at: float | None


def read_trace(path: Path) -> tuple[list[Step], dict[str, EngineRequest]]:
    """Read the Chrome trace that `shoal serve --trace` wrote, whole or broken off after any event.

    Returns:
        The steps in which anything was computed, and by id the requests that joined the batch.

    Raises:
        TraceError: there is no such file, or a line of it is no event, which is named by its number.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            return read_events(lines, str(path))
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror}") from error


def read_events(lines: Iterable[str], name: str) -> tuple[list[Step], dict[str, EngineRequest]]:
    """`read_trace` of the lines that a server wrote, each with its end of line.

    Args:
        name: of what is read, for errors.
    """
    log = StepLog()
    for number, line in enumerate(lines, 1):
        if line.strip() in ("", "[", "]"):
            continue
        try:
            event = msgspec.json.decode(line.strip().removesuffix(","), type=_Event)
            if event.name == "step" and event.ph == "X":
                log.observe(msgspec.json.decode(event.args, type=StepRecord))
        except msgspec.MsgspecError as error:
            if line.endswith("\n"):
                raise TraceError(f"{name}, line {number}: not an event of a step trace") from error
            break  # the writer was ended here
    return log.steps, log.requests


def answer_id(request_id: str) -> str:
    """The id of the answer that a request of the engine is for.

    The server names its engine's requests `ANSWER-PROMPT-CHOICE`.  Of the first choice of the first prompt it is the
    answer's own id; the others, of which a load test has none, keep theirs.
    """
    return request_id.removesuffix("-0-0")


class _Event(msgspec.Struct):
    """An event of a trace, as far as it is read."""

    name: str
    ph: str
    args: msgspec.Raw = msgspec.Raw()


class StepLog:
    """The steps of an engine, of which it is an observer, and the requests that joined the batch, by id."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.requests: dict[str, EngineRequest] = {}
        self._last_end: dict[str, float] = {}

    def observe(self, record: StepRecord) -> None:
        rows = [
            Row(
                answer_id(share.request_id),
                share.row,
                share.num_scheduled_tokens,
                share.num_spec_tokens,
                share.samples,
                share.is_padding,
            )
            for share in record.shares
        ]
        if rows:
            self.steps.append(
                Step(
                    start=record.start,
                    seconds=record.seconds,
                    execute_seconds=record.execute_seconds,
                    rows=rows,
                    num_waiting=record.num_waiting,
                    num_blocks=record.num_blocks,
                    num_used_blocks=record.num_used_blocks,
                    num_kv_tokens=record.num_kv_tokens,
                    num_pairs=record.num_pairs,
                    num_keys=record.num_keys,
                    num_preemptions=record.num_preemptions,
                )
            )
        for request_id, waited in record.joined.items():
            name = answer_id(request_id)
            new = EngineRequest(name, record.start - waited, joined_at=record.start, left_at=None)
            self.requests.setdefault(name, new)
        for row in rows:
            self._last_end[row.request_id] = record.start + record.seconds
        for name in map(answer_id, record.left):
            self.requests[name] = replace(self.requests[name], left_at=self._last_end[name])
