"""From the lines of an input file to bodies of requests, and from answers to the lines of output and error files."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw
from starlette.responses import Response

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.errors import error_body
from shoal.server.routes.pieces import whole_body
from shoal.server.wire.batches import MAX_LINES, BatchError, InputLine
from shoal.server.wire.parsing import parse_body
from shoal.server.wire.requests import MAX_PRIORITY, MAX_SLO_MS

# Whatever the policy, nothing is less urgent.
_LEAST_URGENT = {"priority": MAX_PRIORITY, "ttft_slo_ms": MAX_SLO_MS, "tpot_slo_ms": MAX_SLO_MS}
_LEAST_URGENT_RAW = {name: Raw(b"%d" % value) for name, value in _LEAST_URGENT.items()}


class Line(NamedTuple):
    """A line that waits to be run.

    Attributes:
        number: in its file, from 1.
        body: of the request; one that generates has a seed, so that the same tokens come however often it is run.
    """

    number: int
    custom_id: str
    body: bytes


def read_lines(pieces: Iterable[bytes], endpoint: str, max_bytes: int) -> Iterator[Line | BatchError]:
    """The lines of an input file, and what is wrong with those that are no requests to the endpoint.

    Args:
        pieces: of the file, cut anywhere.
        max_bytes: of a line.
    """
    for number, raw in enumerate(_split(pieces, max_bytes), 1):
        if number > MAX_LINES:
            yield BatchError("too_many_tasks", f"the file has more than {MAX_LINES} lines", None, number)
            return
        if raw.strip():
            yield _read_line(number, raw, endpoint, max_bytes)


def answered(custom_id: str, response: Response) -> bytes:
    """The line of an output or error file for what the endpoint answered."""
    answer = {
        "status_code": response.status_code,
        "request_id": response.headers.get("x-request-id", ""),
        "body": Raw(whole_body(response)),
    }
    return _output_line(custom_id, answer, None)


def unanswered(custom_id: str, code: str, message: str) -> bytes:
    """The line of an error file for a request that was not run."""
    return _output_line(custom_id, None, {"code": code, "message": message})


def _split(pieces: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    """The lines, up to the first that is too long."""
    rest = bytearray()
    for piece in pieces:
        end, *lines = piece.split(b"\n")
        rest += end
        if lines:
            yield bytes(rest)
            yield from lines[:-1]
            rest = bytearray(lines[-1])
        if len(rest) > max_bytes:
            break
    if rest:
        yield bytes(rest)


def _read_line(number: int, raw: bytes, endpoint: str, max_bytes: int) -> Line | BatchError:
    try:
        if len(raw) > max_bytes:
            raise InvalidRequestError(f"the line has more than {max_bytes} bytes")
        line = parse_body(InputLine, raw)
    except InvalidRequestError as error:
        cause, fault = error.__cause__, error_body(error).error
        is_json = cause is None or isinstance(cause, msgspec.ValidationError)
        return BatchError("invalid_request" if is_json else "invalid_json_line", fault.message, fault.param, number)
    if line.url != endpoint:
        return BatchError("url_mismatch", f"url: expected {endpoint!r}, as the batch has it", "url", number)
    body = line.body | _LEAST_URGENT_RAW
    if bytes(body.get("background", b"null")) not in (b"null", b"false"):
        return BatchError("invalid_request", "body.background: a line is answered in its batch", "body", number)
    if endpoint != "/v1/embeddings" and bytes(body.get("seed", b"null")) == b"null":
        body["seed"] = Raw(b"%d" % secrets.randbits(53))
    return Line(number, line.custom_id, msgspec.json.encode(body))


def _output_line(custom_id: str, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    line_id = f"batch_req_{secrets.token_hex(12)}"
    line = {"id": line_id, "custom_id": custom_id, "response": response, "error": error}
    return msgspec.json.encode(line) + b"\n"
