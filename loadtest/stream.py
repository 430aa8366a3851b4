"""Reads streamed completions, as cheaply as times can be taken.

While a stream runs, each event gets its time and is kept.  What the events say is read after the stream has ended, so
that the load generator does not delay the streams that it measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

import msgspec
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPParseError

from shoal.clients import ClientError, ProtocolError, wire
from shoal.loadtest.records import LoadTestError, RequestRecord
from shoal.loadtest.workload import WorkloadRequest

CALL = wire.stream_complete("", {})  # how its answer is read
_HEADERS = {"content-type": "application/json", "accept": "text/event-stream"}
_MAX_CONNECTIONS = 2**16  # an open loop has one for each unanswered request


def read_events(record: RequestRecord, events: Sequence[tuple[float, bytes]]) -> None:
    """Note in `record` what a stream says; what is wrong with it is its `error`, unless it has one.

    Args:
        events: when each of them came, and its data.
    """
    reader = wire.EventReader(CALL)
    texts: list[str] = []
    is_finished = False
    try:
        for time, data in events:
            for chunk in reader.read(data.decode()):
                record.engine_id = f"{chunk.id}-0-0"  # first choice of the first prompt
                for choice in chunk.choices:
                    texts.append(choice.text)
                    is_finished |= choice.finish_reason is not None
                    if choice.text or choice.finish_reason:
                        record.token_times.append(time)
                for name, count in asdict(chunk.usage).items() if chunk.usage else ():
                    setattr(record, name, count)
        reader.finish()
        if not is_finished:
            raise ProtocolError("the stream ended without a finish_reason")
        record.text_hash = sha256("".join(texts).encode()).hexdigest()
    except (ClientError, UnicodeError) as error:
        record.error = record.error or f"in the stream: {error}"


def request_body(request: WorkloadRequest) -> bytes:
    """The JSON of a request, whose answer is streamed and as long as the workload says."""
    same = ("max_tokens", "temperature", "seed", "priority", "ttft_slo_ms", "tpot_slo_ms")
    body: dict[str, Any] = {"prompt": request.prompt or request.prompt_token_ids}
    body |= {name: value for name in same if (value := getattr(request, name)) is not None}
    whose = {"user": request.client} if request.client else {}
    streamed = {"end_after": request.num_output_tokens, "stream": True, "stream_options": {"include_usage": True}}
    return msgspec.json.encode(body | whose | streamed)


class CompletionClient:
    """Sends requests to one server, over as many connections as are needed at a time.

    Args:
        url: of the server; its path comes before that of the API.
        timeout_seconds: longest silence of the server before or in an answer.

    Raises:
        LoadTestError: the url is none.
    """

    def __init__(self, url: str, *, timeout_seconds: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LoadTestError(f"the server must be named by an http:// or https:// address, not {url!r}")
        self._path = parts.path.rstrip("/") + CALL.path
        self._timeout_seconds = timeout_seconds
        limits = {"connection_timeout": 10.0, "network_timeout": timeout_seconds}
        self._http = HTTPClient.from_url(url, concurrency=_MAX_CONNECTIONS, **limits)

    def stream(self, body: bytes, record: RequestRecord, now: Callable[[], float]) -> None:
        """Send a request, follow its answer to the end, and note in `record` what came; what went wrong is its `error`.

        Args:
            body: JSON of the request, which asks for a stream.
            now: the clock of the run.
        """
        events: list[tuple[float, bytes]] = []
        try:
            with self._http.post(self._path, body, _HEADERS) as response:
                if response.status_code == 200:
                    record.accepted_at = now()
                    while line := response.readline(b"\n"):
                        if line.startswith(b"data:"):
                            events.append((now(), line[5:].strip()))
                else:
                    status, reason = response.status_code, response.status_message or ""
                    record.error = str(wire.error_of(status, reason, response.read(), None))
        except TimeoutError:
            record.error = f"timeout: the server was silent for {self._timeout_seconds:g} s"
        except (OSError, HTTPParseError) as error:
            record.error = f"connection: {str(error) or type(error).__name__}"
        finally:
            record.finished_at = now()
            if events or record.error is None:
                read_events(record, events)

    def close(self) -> None:
        self._http.close()
