"""The steps of an engine: read from its trace, and what they say of requests and rows."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from msgspec import Struct

from shoal.loadtest.records import LoadTestError, decode
from shoal.scheduler.step_record import ShareRecord, StepRecord


class _Event(Struct):
    """Any event of a Chrome trace."""

    name: str
    ph: str


class _StepEvent(Struct):
    args: StepRecord


def read_trace(path: Path, started_at: float) -> list[StepRecord]:
    """Read the Chrome trace that `shoal serve --trace` wrote, packed by `pack`, whole or broken off after any event.

    Returns:
        The steps from `started_at` on in which anything was computed, on a clock that is 0 then.

    Raises:
        LoadTestError: the file cannot be read, or a line of it is no event; its number is named.
    """
    steps: list[StepRecord] = []
    for number, line in enumerate(_lines(path), 1):
        event = line.strip().removesuffix(b",")
        if event in (b"", b"[", b"]"):
            continue
        place = f"{path}, line {number}"
        try:
            known: _Event = decode(event, _Event, place)
            step: StepRecord | None = None
            if (known.name, known.ph) == ("step", "X"):
                step = decode(event, _StepEvent, place).args
        except LoadTestError:
            if not line.endswith(b"\n"):
                break  # the writer was ended here
            raise
        if step is not None and step.shares and step.start >= started_at:
            steps.append(replace(step, start=step.start - started_at))
    return steps


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) as lines:
            yield from lines
    except (OSError, EOFError, zlib.error) as error:
        raise LoadTestError(f"the trace {path} cannot be read: {error}") from error


def pack(trace: Path, packed: Path) -> None:
    """Compress a trace to a twentieth, and delete it; nothing if there is none."""
    if trace.exists():
        with trace.open("rb") as plain, gzip.open(packed, "wb", compresslevel=3) as file:
            while block := plain.read(2**20):
                file.write(block)
        trace.unlink()


# -- requests ----------------------------------------------------------------------------------------------------------


class Stay(NamedTuple):
    """A request's way through the engine, on the clock of its steps.

    Attributes:
        arrived_at: when the API process took the request.
        joined_at: start of its first step.
        left_at: end of its last step, a padding row's included; None if it did not leave.
    """

    arrived_at: float
    joined_at: float
    left_at: float | None = None


def stays(steps: Iterable[StepRecord]) -> dict[str, Stay]:
    """The stays of all requests that joined the batch, by their ids in the engine."""
    found: dict[str, Stay] = {}
    last_end: dict[str, float] = {}
    for step in steps:
        for request_id, waited in step.joined.items():
            found.setdefault(request_id, Stay(step.start - waited, step.start))
        for share in step.shares:
            last_end[share.request_id] = step.start + step.seconds
        for request_id in step.left:
            if request_id in found:
                found[request_id] = found[request_id]._replace(left_at=last_end[request_id])
    return found


# -- rows --------------------------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """A row that one request occupied with one kind of work in consecutive steps.

    Attributes:
        turn: number of other requests that had occupied the row before.
        work: "prefill", "decode" or "padding".
        start, end: seconds; a row belongs to its request between its steps too.
    """

    row: int
    turn: int
    request_id: str
    work: str
    start: float
    end: float


def work(share: ShareRecord) -> str:
    """What a share of a step is; a prompt's last token that is scheduled alone cannot be told from decode."""
    if share.is_padding:
        return "padding"
    return "decode" if share.samples and share.num_scheduled_tokens - share.num_spec_tokens <= 1 else "prefill"


def bars(steps: Iterable[StepRecord]) -> list[Bar]:
    """The picture of the batch, in the order of the bars' starts."""
    done: list[Bar] = []
    last: dict[int, Bar] = {}  # of each row, its last bar
    before: set[int] = set()  # rows of the step before
    for step in steps:
        end = step.start + step.seconds
        for share in step.shares:
            bar, kind = last.get(share.row), work(share)
            goes_on = bar is not None and bar.request_id == share.request_id and share.row in before
            if bar is not None and goes_on and bar.work == kind:
                last[share.row] = bar._replace(end=end)
                continue
            if bar is not None:
                done.append(bar._replace(end=step.start) if goes_on else bar)
            turn = 0 if bar is None else bar.turn + (bar.request_id != share.request_id)
            last[share.row] = Bar(share.row, turn, share.request_id, kind, step.start, end)
        before = {share.row for share in step.shares}
    return sorted([*done, *last.values()], key=lambda bar: (bar.start, bar.row))


def window(steps: Sequence[StepRecord], num_stays: int = 3) -> tuple[float, float]:
    """From the first step on, a time that shows several stays; those of a static batch are as long as the batch."""
    start, end = steps[0].start, steps[-1].start + steps[-1].seconds
    lengths = [stay.left_at - stay.joined_at for stay in stays(steps).values() if stay.left_at is not None]
    return start, min(end, start + num_stays * median(lengths)) if lengths else end
