"""The results file of a load generator: JSON lines, written as requests finish, so that nothing measured is lost.

The first line has the start of the run on the machine's monotonic clock, which is that of the engine's trace; then
comes a line for each request; the last has the processor time that the load generator took.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from shoal.loadtest.errors import LoadTestError
from shoal.loadtest.records import RequestRecord

_RECORD_FIELDS = {one.name for one in fields(RequestRecord)}
RECORD_PREFIX = b'{"request_id": '


@dataclass(slots=True, kw_only=True)
class LocustResult:
    """What a load generator measured.

    Attributes:
        records: in the order in which requests were sent.
        cpu_seconds: processor time of the load generator from the start of the run on; 0 if it was cut off.
        started_at: start of the run, from which all times count, on the monotonic clock.
        is_whole: whether the load generator came to its end.
    """

    records: list[RequestRecord] = field(default_factory=list)
    cpu_seconds: float = 0.0
    started_at: float = 0.0
    is_whole: bool = False


class ResultsWriter:
    """Writes a results file anew; what was added is in the file at once."""

    def __init__(self, path: Path, *, started_at: float) -> None:
        self._file = path.open("w", encoding="utf-8", buffering=1)  # line by line
        self._write({"started_at": started_at})

    def add(self, record: RequestRecord) -> None:
        rounded = asdict(record) | {"token_times": [round(time, 6) for time in record.token_times]}
        self._write(rounded)

    def end(self, cpu_seconds: float) -> None:
        """Note the end of the run; should more come of it after all, it may be noted again."""
        self._write({"cpu_seconds": cpu_seconds})

    def close(self) -> None:
        self._file.close()

    def _write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")


def read_results(path: Path) -> LocustResult:
    """Read a results file, whole or cut off at any place: a line without its end is left out.

    Raises:
        LoadTestError: there is no such file, or a line of it is broken, which is named by its number.
    """
    result = LocustResult()
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise LoadTestError(f"the results {path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            _take(result, json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise LoadTestError(f"{path}, line {number}: not a line of a results file: {error}") from error
    result.records.sort(key=lambda record: record.sent_at)
    return result


def _take(result: LocustResult, values: Any) -> None:
    match values:
        case {"started_at": float(started_at)}:
            result.started_at = started_at
        case {"cpu_seconds": float(cpu_seconds)}:
            result.cpu_seconds = cpu_seconds
            result.is_whole = True
        case {"request_id": str()} if values.keys() == _RECORD_FIELDS:
            result.records.append(RequestRecord(**values))
        case _:
            raise ValueError("unknown fields")
