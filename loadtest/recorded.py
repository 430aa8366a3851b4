"""Other people's traces as workloads, and workloads as their traces: Mooncake's JSON lines, and Azure's CSV.

Both say when requests came and how long they were, and Mooncake's which of their blocks are alike.  Neither has texts:
a prompt is made of numbers, the same for the same block, and is sent in tokens.
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from hashlib import shake_256
from math import ceil
from pathlib import Path
from typing import Annotated, overload

import msgspec
from msgspec import Meta, Struct

from shoal.loadtest.arrivals import Arrival
from shoal.loadtest.records import LoadTestError, read_lines
from shoal.loadtest.workload import WorkloadRequest, read_workload
from shoal.scheduler.prefix_cache import extend_hashes

MOONCAKE_BLOCK = 512  # tokens
AZURE_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
_BEGAN = datetime(2024, 1, 1)  # of what is written as Azure's
_FIRST_TOKEN = (
    256  # from here on, a byte is a token; those before are special ones, or single bytes, in most vocabularies
)

Count = Annotated[int, Meta(ge=1)]


class Recorded(Struct, frozen=True, kw_only=True):
    """A request of a trace, as Mooncake writes it (Qin et al. 2024); other fields are passed over.

    Attributes:
        timestamp: milliseconds after the start.
        input_length, output_length: in tokens.
        hash_ids: of the blocks of the prompt, the last of which may be partly full; the same where prompts are the
            same up to the end of the block.
    """

    timestamp: Annotated[float, Meta(ge=0)]
    input_length: Count
    output_length: Count
    hash_ids: list[Annotated[int, Meta(ge=0)]]

    def __post_init__(self) -> None:
        if len(self.hash_ids) != (blocks := ceil(self.input_length / MOONCAKE_BLOCK)):
            raise ValueError(f"hash_ids: {len(self.hash_ids)} of them for input_length, which has {blocks} blocks")


class Trace(Sequence[WorkloadRequest]):
    """The requests of a trace; each is made when it is asked for, because a million prompts fill a memory.

    Args:
        shrink: all lengths are divided by this, and rounded up, for models whose context is shorter.
    """

    def __init__(self, rows: Sequence[Recorded], shrink: int = 1) -> None:
        self._rows, self._shrink = rows, shrink

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> WorkloadRequest: ...

    @overload
    def __getitem__(self, place: slice) -> Trace: ...

    def __getitem__(self, place: int | slice) -> WorkloadRequest | Trace:
        if isinstance(place, slice):
            return Trace(self._rows[place], self._shrink)
        row = self._rows[place]
        prompt = array("i")
        for one in row.hash_ids:
            prompt += _block(one, MOONCAKE_BLOCK // self._shrink)
        num_output_tokens = ceil(row.output_length / self._shrink)
        request_id = f"recorded-{place % len(self._rows):07}"
        return WorkloadRequest(
            request_id=request_id,
            session=request_id,
            prompt_token_ids=prompt[: ceil(row.input_length / self._shrink)].tolist(),
            num_output_tokens=num_output_tokens,
            max_tokens=num_output_tokens,
            arrival_time=row.timestamp / 1000,
        )


@lru_cache(1024)
def _block(hash_id: int, num_tokens: int) -> array[int]:
    return array("i", map(_FIRST_TOKEN.__add__, shake_256(b"%d" % hash_id).digest(num_tokens)))


def read_requests(path: Path, shrink: int = 1) -> Sequence[WorkloadRequest]:
    """Read a trace in one of the two formats, or a workload of our own; `Trace` says what is shrunk.

    Raises:
        LoadTestError: the file cannot be read, or has no request; or a line is broken, whose number and field are
            named.
    """
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise LoadTestError(f"{path} cannot be read: {error}") from error
    if first.startswith(AZURE_HEADER[0]):
        rows = list(_read_azure(path))
    elif '"hash_ids"' in first:
        rows = list(read_lines(path, Recorded))
    else:
        return read_workload(path)
    if not rows:
        raise LoadTestError(f"the trace {path} is empty: it must have at least one request")
    return Trace(rows, shrink)


def _read_azure(path: Path) -> Iterator[Recorded]:
    """Azure's LLM inference traces (Patel et al. 2024); no two prompts are alike."""
    began: datetime | None = None
    number_of_blocks = 0
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        for line in lines:
            place = f"{path}, line {lines.line_num}"
            if lines.line_num == 1:
                if line != AZURE_HEADER:
                    raise LoadTestError(f"{place}: the header must be {','.join(AZURE_HEADER)}, not {','.join(line)}")
                continue
            if len(line) != len(AZURE_HEADER):
                raise LoadTestError(f"{place}: {len(line)} fields instead of {len(AZURE_HEADER)}")
            moment = _moment(line[0], place)
            lengths = [_length(name, text, place) for name, text in zip(AZURE_HEADER[1:], line[1:], strict=True)]
            began = began or moment
            if moment < began:
                raise LoadTestError(f"{place}: TIMESTAMP {line[0]} is before that of the first request")
            num_blocks = ceil(lengths[0] / MOONCAKE_BLOCK)
            yield Recorded(
                timestamp=(moment - began) / timedelta(milliseconds=1),
                input_length=lengths[0],
                output_length=lengths[1],
                hash_ids=list(range(number_of_blocks, number_of_blocks + num_blocks)),
            )
            number_of_blocks += num_blocks


def _moment(text: str, place: str) -> datetime:
    try:
        whole, _, fraction = text.partition(".")
        return datetime.fromisoformat(whole).replace(tzinfo=None) + timedelta(seconds=float(f"0.{fraction or 0}"))
    except ValueError as error:
        raise LoadTestError(f"{place}: TIMESTAMP must be like 2023-11-16 18:15:46.6805900, not {text!r}") from error


def _length(name: str, text: str, place: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise LoadTestError(f"{place}: {name} must be a whole number of at least 1, not {text!r}")
    return int(text)


# -- written -----------------------------------------------------------------------------------------------------------


def recorded(arrivals: Iterable[Arrival]) -> Iterator[Recorded]:
    """The requests of an open loop as a trace."""
    hash_ids: dict[bytes, int] = {}
    for seconds, request in arrivals:
        count, hashes = len(request.prompt_token_ids), list[bytes]()
        extend_hashes(hashes, ceil(count / MOONCAKE_BLOCK), request.prompt_token_ids, "", MOONCAKE_BLOCK)
        yield Recorded(
            timestamp=seconds * 1000,
            input_length=count,
            output_length=request.num_output_tokens,
            hash_ids=[hash_ids.setdefault(one, len(hash_ids)) for one in hashes],
        )


def write_recorded(path: Path, rows: Iterable[Recorded]) -> None:
    """Write a trace: Azure's if the name ends with .csv, and Mooncake's otherwise."""
    if path.suffix != ".csv":
        path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(AZURE_HEADER)
        for row in rows:
            moment = _BEGAN + timedelta(milliseconds=row.timestamp)
            lines.writerow([moment.isoformat(" ", "microseconds"), row.input_length, row.output_length])
