"""Streams completions from a server, as cheaply as times can be taken.

While a stream runs, a line that comes is given its time and kept, and nothing else is done: what the lines say is read
after the stream has ended, so that the load generator does not delay the streams that it measures.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPParseError

from shoal.loadtest.errors import LoadTestError
from shoal.loadtest.records import RequestRecord
from shoal.loadtest.workload import WorkloadRequest

PATH = "/v1/completions"
_HEADERS = {"content-type": "application/json", "accept": "text/event-stream"}
_CONNECT_SECONDS = 10.0
_MAX_CONNECTIONS = 2**16  # an open loop has as many as are unanswered
_CONNECTION_ERROR = "connection: "
_MAX_SHOWN = 300  # characters of an answer that is no stream


def is_connection_error(record: RequestRecord) -> bool:
    """Whether the server could not be reached, or went away."""
    return record.error is not None and record.error.startswith(_CONNECTION_ERROR)


def request_body(request: WorkloadRequest) -> bytes:
    """The JSON of a request, its answer streamed and of the length that the workload says."""
    body: dict[str, Any] = {
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "end_after": request.num_output_tokens,
        "temperature": request.temperature,
        "seed": request.seed,
        "user": request.client or None,
        "priority": request.priority,
        "ttft_slo_ms": request.ttft_slo_ms,
        "tpot_slo_ms": request.tpot_slo_ms,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps({name: value for name, value in body.items() if value is not None}).encode()


class CompletionClient:
    """Sends requests to one server, over as many connections as are needed at a time.

    Args:
        url: of the server; what its path says comes before that of the API.
        timeout_seconds: longest silence of the server before or in an answer.

    Raises:
        LoadTestError: the url is none.
    """

    def __init__(self, url: str, *, timeout_seconds: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LoadTestError(f"the server must be named by an http:// or https:// address, not {url!r}")
        self._path = parts.path.rstrip("/") + PATH
        self._timeout_seconds = timeout_seconds
        self._http = HTTPClient.from_url(
            url,
            concurrency=_MAX_CONNECTIONS,
            connection_timeout=_CONNECT_SECONDS,
            network_timeout=timeout_seconds,
        )

    def stream(self, request: WorkloadRequest, record: RequestRecord, now: Callable[[], float]) -> None:
        """Send a request, follow its answer to the end, and note in `record` what came; what went wrong is its `error`.

        Args:
            now: the clock of the run.
        """
        lines: list[bytes] = []
        times: list[float] = []
        try:
            with self._http.post(self._path, request_body(request), _HEADERS) as response:
                if response.status_code == 200:
                    while line := response.readline(b"\n"):
                        if line.startswith(b"data:"):
                            times.append(now())
                            lines.append(line)
                else:
                    record.error = _refusal(response.status_code, response.read())
        except TimeoutError:
            record.error = f"timeout: the server was silent for {self._timeout_seconds:g} s"
        except (OSError, HTTPParseError) as error:
            record.error = f"{_CONNECTION_ERROR}{str(error) or type(error).__name__}"
        finally:
            record.finished_at = now()
            if lines or record.error is None:
                read_events(record, lines, times)

    def close(self) -> None:
        self._http.close()


def read_events(record: RequestRecord, lines: list[bytes], times: list[float]) -> None:
    """Note what the `data:` lines of a stream say; an error that is noted already stays."""
    payloads = [line[5:].strip() for line in lines]
    is_done = payloads[-1:] == [b"[DONE]"]
    if is_done:
        payloads.pop()
    reader = _EventReader(record)
    try:
        for event, time in zip(json.loads(b"[" + b",".join(payloads) + b"]"), times, strict=False):
            reader.read(event, time)
        record.text_hash = sha256("".join(reader.texts).encode("utf-8", "surrogatepass")).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        record.error = record.error or f"the stream is malformed: {type(error).__name__}: {error}"
    if record.error is None and not (is_done and reader.is_finished):
        record.error = f"the stream ended without {'a finish_reason' if is_done else '[DONE]'}"


class _EventReader:
    """Reads the events of a stream one by one."""

    def __init__(self, record: RequestRecord) -> None:
        self.texts: list[str] = []
        self.is_finished = False
        self._record = record

    def read(self, event: dict[str, Any], time: float) -> None:
        if "error" in event:
            self._record.error = self._record.error or f"in the stream: {_message(event)}"
            return
        self._record.server_id = event["id"]
        for choice in event["choices"]:
            self.texts.append(choice["text"])
            self.is_finished |= choice["finish_reason"] is not None
            if choice["text"] or choice["finish_reason"]:
                self._record.token_times.append(time)
        if usage := event.get("usage"):
            self._note_usage(usage)

    def _note_usage(self, usage: dict[str, Any]) -> None:
        drafted = usage.get("completion_tokens_details") or {}
        self._record.num_prompt_tokens = usage["prompt_tokens"]
        self._record.num_output_tokens = usage["completion_tokens"]
        self._record.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        self._record.num_accepted_tokens = drafted.get("accepted_prediction_tokens") or 0
        self._record.num_rejected_tokens = drafted.get("rejected_prediction_tokens") or 0


def _refusal(status: int, body: bytes) -> str:
    try:
        message = _message(json.loads(body))
    except (ValueError, RecursionError, KeyError, TypeError):
        message = body.decode(errors="replace")
    return f"HTTP {status}: {message[:_MAX_SHOWN]}"


def _message(body: dict[str, Any]) -> str:
    return str(body["error"]["message"])
