"""What is asked of a server in a load test: requests with the lengths of their outputs, saved as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shoal.loadtest.errors import WorkloadError


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRequest:
    """One request of a workload.

    Attributes:
        request_id: unique in its workload.
        session: requests of one session follow each other, each after the answer to the one before; a request alone
            is a session of its own.
        client: whose it is, sent as `user`; empty if nobody's.
        prompt: text.
        prompt_token_ids: the same for the model that the workload was made for; the simulator needs them.
        num_output_tokens: how long the output will be, which the server enforces (`end_after`).
        max_tokens: the limit that the request names, the same in a whole workload, so that it tells nothing.
        temperature, seed: of sampling.
        priority, ttft_slo_ms, tpot_slo_ms: for the policy; None leaves them to the server.
        arrival_time: seconds after the start at which an open loop sends it; None where the load decides.
    """

    request_id: str
    session: str
    client: str = ""
    prompt: str
    prompt_token_ids: list[int]
    num_output_tokens: int
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    priority: int = 0
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    arrival_time: float | None = None


def write_workload(path: Path, requests: Iterable[WorkloadRequest]) -> None:
    """Save requests, one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for request in requests:
            file.write(json.dumps(asdict(request), ensure_ascii=False) + "\n")


def read_workload(path: Path) -> list[WorkloadRequest]:
    """Read what `write_workload` saved.

    Raises:
        WorkloadError: there is no such file, no request in it, or a line is broken, which is named by its number.
    """
    try:
        # Lines end with \n alone: a prompt may well hold one of the other characters that end lines in Unicode.
        with path.open(encoding="utf-8", newline="\n") as file:
            requests = [_parse(line, f"{path}, line {number}") for number, line in enumerate(file, 1)]
    except OSError as error:
        raise WorkloadError(f"the workload {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise WorkloadError(f"the workload {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    if not requests:
        raise WorkloadError(f"the workload {path} is empty: it must have at least one request")
    _check_unique(path, requests)
    return requests


def _parse(line: str, place: str) -> WorkloadRequest:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WorkloadError(f"{place}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise WorkloadError(f"{place}: must be a JSON object")
    known = {field.name: field for field in fields(WorkloadRequest)}
    if unknown := values.keys() - known.keys():
        raise WorkloadError(f"{place}: unknown field {min(unknown)!r}; there are {', '.join(known)}")
    for name, field in known.items():
        if name in values:
            _check(name, values[name], place)
        elif field.default is MISSING:
            raise WorkloadError(f"{place}: field {name!r} is missing")
    if values["num_output_tokens"] > values["max_tokens"]:
        raise WorkloadError(
            f"{place}: num_output_tokens is {values['num_output_tokens']}, "
            f"but can be at most max_tokens, which is {values['max_tokens']}"
        )
    return WorkloadRequest(**values)


def _check_unique(path: Path, requests: list[WorkloadRequest]) -> None:
    lines: dict[str, int] = {}
    for number, request in enumerate(requests, 1):
        first = lines.setdefault(request.request_id, number)
        if first != number:
            raise WorkloadError(f"{path}, line {number}: request_id {request.request_id!r} is that of line {first} too")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # so it is no NaN


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


# What a field may be, and how to say so.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_is_text, "a string that is not empty"),
    "string": (lambda value: isinstance(value, str), "a string"),
    "tokens": (
        lambda value: isinstance(value, list) and bool(value) and all(_is_integer(v) and v >= 0 for v in value),
        "a list of token ids that is not empty",
    ),
    "count": (lambda value: _is_integer(value) and value >= 1, "an integer of at least 1"),
    "integer": (_is_integer, "an integer"),
    "seed": (lambda value: _is_integer(value) and -(2**63) <= value < 2**64, "an integer of 64 bits"),
    "amount": (lambda value: _is_number(value) and value >= 0, "a finite number of at least 0"),
    "time": (lambda value: value is None or (_is_number(value) and value >= 0), "null or a number of at least 0"),
    "limit": (lambda value: value is None or (_is_number(value) and value > 0), "null or a number above 0"),
}
_KIND_OF = {
    "request_id": "name",
    "session": "name",
    "client": "string",
    "prompt": "name",
    "prompt_token_ids": "tokens",
    "num_output_tokens": "count",
    "max_tokens": "count",
    "temperature": "amount",
    "seed": "seed",
    "priority": "integer",
    "ttft_slo_ms": "limit",
    "tpot_slo_ms": "limit",
    "arrival_time": "time",
}


def _check(name: str, value: Any, place: str) -> None:
    is_right, what = _KINDS[_KIND_OF[name]]
    if not is_right(value):
        shown = repr(value)
        raise WorkloadError(f"{place}: {name} must be {what}, not {shown[:60]}{'...' if len(shown) > 60 else ''}")
