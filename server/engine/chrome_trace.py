"""The step trace: a file in Chrome's Trace Event Format, which https://ui.perfetto.dev opens."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec

from shoal.scheduler.errors import ConfigError
from shoal.scheduler.step_record import StepRecord

logger = logging.getLogger("shoal.engine")

_STEPS = 1  # the thread on which the steps are drawn; row n is drawn on thread _ROWS + n
_ROWS = 2


def begin_trace(path: Path) -> None:
    """Empty the file, before an engine writes to it.

    Raises:
        ConfigError: it cannot be written.
    """
    with _refusing(path):
        path.write_bytes(b"")


@dataclass(slots=True)
class _Stay:
    """A request's time in a row of the batch, in nanoseconds.

    Attributes:
        arrival: when the request arrived.
        start, end: of its first step in the row and of its last one so far.
    """

    row: int
    arrival: int
    start: int
    end: int


class ChromeTrace:
    """Writes each step to a file as soon as it is over: an observer of an `EngineCore`.

    The file is a JSON array with an event on each line.  `close` ends the array; the format allows a file that ends
    before.  An engine that takes the place of one that died goes on where that one ended.

    - Thread `steps`: an event for each step, with `schedule`, `execute` and `update` inside it.  Its `args` are the
      encoded `StepRecord`.
    - Thread `row N`: an event for each stay of a request in that row of the batch, padding included.
    - Metadata `engine`: what the engine says of itself, if it says anything.
    - Counters `running`, `waiting` and `KV usage` (share of the blocks that requests own).

    Times are microseconds with three decimals, as the format has it; those in a `StepRecord` are seconds.

    Args:
        about: what the engine says of itself.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path, about: Mapping[str, Any] | None = None) -> None:
        self._path = path
        with _refusing(path):
            self._file: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._is_empty = os.fstat(self._file).st_size == 0
        self._pid = os.getpid()
        self._stays: dict[str, _Stay] = {}
        self._named: set[int] = set()
        self._events: list[bytes] = []
        self._add("process_name", "M", tid=_STEPS, args={"name": "engine"})
        self._add("thread_name", "M", tid=_STEPS, args={"name": "steps"})
        if about is not None:
            self._add("engine", "M", tid=_STEPS, args=about)
        self._flush()

    def __call__(self, record: StepRecord) -> None:
        """Write a step."""
        parts = (record.start, record.schedule_seconds, record.execute_seconds, record.update_seconds)
        # Whole nanoseconds, so that what lies inside a step does so to the last digit.
        start, scheduled, executed, end = (round(seconds * 1e9) for seconds in accumulate(parts))
        for share in record.shares:
            if share.request_id not in self._stays:
                if share.row not in self._named:
                    self._named.add(share.row)
                    self._add("thread_name", "M", tid=_ROWS + share.row, args={"name": f"row {share.row}"})
                arrival = start - round(record.joined.get(share.request_id, 0.0) * 1e9)
                self._stays[share.request_id] = _Stay(share.row, arrival, start, end)
            self._stays[share.request_id].end = end
        self._span("step", _STEPS, start, end, record)
        self._span("schedule", _STEPS, start, scheduled)
        self._span("execute", _STEPS, scheduled, executed)
        self._span("update", _STEPS, executed, end)
        self._count(start, record.num_running, record.num_waiting, record.num_used_blocks / record.num_blocks)
        for request_id in record.preempted:
            self._end_stay(request_id, is_preempted=True)
        for request_id in record.left:
            self._end_stay(request_id, is_preempted=False)
        if not self._stays and not record.num_waiting:
            self._count(end, 0, 0, 0.0)
        self._flush()

    def close(self) -> None:
        """End the array, so that the file is valid JSON.  What comes after is not written."""
        self._write(b"\n]\n")
        if self._file is not None:
            os.close(self._file)
            self._file = None

    # -- events --------------------------------------------------------------------------------------------------

    def _end_stay(self, request_id: str, *, is_preempted: bool) -> None:
        stay = self._stays.pop(request_id, None)
        if stay is not None:
            args = {"arrived": stay.arrival / 1000, "preempted": is_preempted}
            self._span(request_id, _ROWS + stay.row, stay.start, stay.end, args)

    def _span(self, name: str, tid: int, start: int, end: int, args: object = None) -> None:
        more = {"args": args} if args else {}
        self._add(name, "X", ts=start / 1000, dur=(end - start) / 1000, tid=tid, **more)

    def _count(self, at: int, running: int, waiting: int, usage: float) -> None:
        self._add("running", "C", ts=at / 1000, args={"requests": running})
        self._add("waiting", "C", ts=at / 1000, args={"requests": waiting})
        self._add("KV usage", "C", ts=at / 1000, args={"share": usage})

    def _add(self, name: str, ph: str, **fields: Any) -> None:
        """Add an event of the phase `ph`: X for a span, C for a counter, M for the name of a thread."""
        self._events.append(msgspec.json.encode({"name": name, "ph": ph, **fields, "pid": self._pid}))

    # -- the file ------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        self._write((b"[\n" if self._is_empty else b",\n") + b",\n".join(self._events))
        self._is_empty = False
        self._events.clear()

    def _write(self, text: bytes) -> None:
        """Write without a buffer.  A full disk ends the trace, after a whole event, and not the engine."""
        num_written = 0
        while self._file is not None and num_written < len(text):
            try:
                num_written += os.write(self._file, text[num_written:])
            except OSError as error:
                logger.error("the trace %s ends here: %s", self._path, error.strerror)
                with suppress(OSError):  # of what is no regular file nothing can be taken back
                    os.ftruncate(self._file, os.fstat(self._file).st_size - num_written)
                os.close(self._file)
                self._file = None


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"trace: cannot write {path}: {error.strerror}", param="trace") from error
