"""The steps of an engine: read from its trace, and what they say of requests and rows."""

from __future__ import annotations

import gzip
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

from msgspec import Raw, Struct

from shoal.loadtest.records import LoadTestError, ServerInfo, decode
from shoal.scheduler.step_record import StepRecord

_GZIP = b"\x1f\x8b"  # with which a packed file begins


class _Event(Struct):
    """Any event of a Chrome trace."""

    name: str
    args: Raw = Raw()


class Trace(NamedTuple):
    """What a trace says.

    Attributes:
        steps: in which anything was computed, on the clock of the engine.
        server: limits and settings of the engine that wrote last; None in a trace of an older Shoal.
    """

    steps: list[StepRecord]
    server: ServerInfo | None


def read_trace(path: Path, started_at: float) -> list[StepRecord]:
    """The steps of a trace from `started_at` on in which anything was computed, on a clock that is 0 then.

    Raises:
        LoadTestError: as `read_whole_trace` does.
    """
    steps = read_whole_trace(path).steps
    return [replace(step, start=step.start - started_at) for step in steps if step.start >= started_at]


def read_whole_trace(path: Path) -> Trace:
    """Read the Chrome trace that `shoal serve --trace` wrote, whole or broken off after any event, plain or packed.

    Raises:
        LoadTestError: the file cannot be read, or a line of it is no event; its number is named.
    """
    try:
        with path.open("rb") as file:
            is_packed = file.read(2) == _GZIP
        with gzip.open(path) if is_packed else path.open("rb") as file:
            lines = file.readlines()
    except (OSError, EOFError, zlib.error) as error:
        raise LoadTestError(f"the trace {path} cannot be read: {error}") from error
    steps: list[StepRecord] = []
    server: ServerInfo | None = None
    for number, line in enumerate(lines, 1):
        place, text = f"{path}, line {number}", line.strip(b"[],\r\n")
        try:
            event = decode(text, _Event, place) if text else _Event("")
            if event.name == "step":
                steps.append(decode(bytes(event.args), StepRecord, place))
            elif event.name == "engine":
                server = decode(bytes(event.args), ServerInfo, place)
        except LoadTestError:
            if line.endswith(b"\n"):
                raise
            break  # the writer was ended here
    return Trace([step for step in steps if step.shares], server)


def pack(trace: Path, packed: Path) -> None:
    """Compress a trace to a twentieth, and delete it; nothing if there is none."""
    if trace.exists():
        with trace.open("rb") as plain, gzip.open(packed, "wb", compresslevel=3) as file:
            shutil.copyfileobj(plain, file)
        trace.unlink()


class Stay(NamedTuple):
    """A request's way into the batch, on the clock of its steps.

    Attributes:
        arrived_at: when the API process took the request.
        joined_at: start of its first step.
    """

    arrived_at: float
    joined_at: float


def stays(steps: Iterable[StepRecord]) -> dict[str, Stay]:
    """The stays of all requests that joined the batch, by their ids in the engine; a preempted one joins again."""
    found: dict[str, Stay] = {}
    for step in steps:
        for request_id, waited in step.joined.items():
            found.setdefault(request_id, Stay(step.start - waited, step.start))
    return found


def ends(steps: Sequence[StepRecord]) -> list[float]:
    """Until when the rows of each step are occupied: until the next step starts, if some request goes on in it."""
    found = [step.start + step.seconds for step in steps]
    names = [{share.request_id for share in step.shares} for step in steps]
    for number, (own, following) in enumerate(pairwise(names)):
        if own & following:
            found[number] = steps[number + 1].start
    return found


class Bar(NamedTuple):
    """A row that one request occupied from `start` to `end` with one kind of work: "prefill", "decode" or "padding"."""

    row: int
    request_id: str
    work: str
    start: float
    end: float


def bars(steps: Sequence[StepRecord]) -> Iterator[Bar]:
    """The picture of the batch, row by row.  The bar of a request that pauses goes on, for it keeps its row."""
    rows: dict[int, list[Bar]] = {}
    for step, end in zip(steps, ends(steps), strict=True):
        for share in step.shares:
            # A prompt's last token that is scheduled alone cannot be told from decode.
            is_decode = share.samples and share.num_scheduled_tokens - share.num_spec_tokens <= 1
            work = "padding" if share.is_padding else "decode" if is_decode else "prefill"
            rows.setdefault(share.row, []).append(Bar(share.row, share.request_id, work, step.start, end))
    for pieces in rows.values():
        for _, alike in groupby(pieces, lambda bar: bar[:3]):
            of_bar = list(alike)
            yield of_bar[0]._replace(end=of_bar[-1].end)
