"""Reads streamed completions, as cheaply as times can be taken.

While a stream runs, each line gets its time and is kept.  What the lines say is read after the stream has ended, so
that the load generator does not delay the streams that it measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

import msgspec
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPParseError

from shoal.loadtest.records import LoadTestError, RequestRecord, decode
from shoal.loadtest.workload import WorkloadRequest

PATH = "/v1/completions"
_HEADERS = {"content-type": "application/json", "accept": "text/event-stream"}
_CONNECT_SECONDS = 10.0
_MAX_CONNECTIONS = 2**16  # an open loop has one for each unanswered request
_CONNECTION_ERROR = "connection: "
_MAX_SHOWN = 300  # characters of an answer that is no stream


def events(lines: Iterable[bytes]) -> Iterator[Any]:
    """The server-sent events of a stream, decoded from JSON; each is one `data:` line, and `[DONE]` is the last.

    Raises:
        LoadTestError: an event is malformed or follows `[DONE]`, or there is no `[DONE]`; all events before were given.
    """
    is_done = False
    for line in filter(None, map(bytes.strip, lines)):
        if is_done or not line.startswith(b"data:"):
            raise LoadTestError(f"the stream is malformed: unexpected line {line[:_MAX_SHOWN]!r}")
        payload = line[5:].strip()
        is_done = payload == b"[DONE]"
        if not is_done:
            yield decode(payload, Any, "the stream is malformed")
    if not is_done:
        raise LoadTestError("the stream ended without [DONE]")


def read_events(record: RequestRecord, lines: list[bytes], times: list[float]) -> None:
    """Note in `record` what the lines of a stream say; what is wrong with it is its `error`, unless it has one.

    Args:
        times: when each of the lines came.
    """
    texts: list[str] = []
    is_finished = False
    try:
        for event, time in zip(events(lines), [*times, 0.0], strict=False):
            if "error" in event:
                raise LoadTestError(f"in the stream: {event['error']['message']}")
            record.engine_id = f"{event['id']}-0-0"  # first choice of the first prompt
            for choice in event["choices"]:
                texts.append(choice["text"])
                is_finished |= choice["finish_reason"] is not None
                if choice["text"] or choice["finish_reason"]:
                    record.token_times.append(time)
            if usage := event.get("usage"):
                record.num_prompt_tokens, record.num_output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                record.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                drafted = usage.get("completion_tokens_details") or {}
                record.num_accepted_tokens = drafted.get("accepted_prediction_tokens") or 0
                record.num_rejected_tokens = drafted.get("rejected_prediction_tokens") or 0
        record.text_hash = sha256("".join(texts).encode()).hexdigest()
        if not is_finished:
            raise LoadTestError("the stream ended without a finish_reason")
    except LoadTestError as error:
        record.error = record.error or str(error)
    except (KeyError, TypeError, AttributeError) as error:
        record.error = record.error or f"the stream is malformed: {type(error).__name__}: {error}"


def request_body(request: WorkloadRequest) -> bytes:
    """The JSON of a request, whose answer is streamed and as long as the workload says."""
    same = ("prompt", "max_tokens", "temperature", "seed", "priority", "ttft_slo_ms", "tpot_slo_ms")
    body: dict[str, Any] = {name: value for name in same if (value := getattr(request, name)) is not None}
    whose = {"user": request.client} if request.client else {}
    streamed = {"end_after": request.num_output_tokens, "stream": True, "stream_options": {"include_usage": True}}
    return msgspec.json.encode(body | whose | streamed)


def is_connection_error(record: RequestRecord) -> bool:
    """Whether the server could not be reached, or went away."""
    return record.error is not None and record.error.startswith(_CONNECTION_ERROR)


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
        self._path = parts.path.rstrip("/") + PATH
        self._timeout_seconds = timeout_seconds
        limits = {"connection_timeout": _CONNECT_SECONDS, "network_timeout": timeout_seconds}
        self._http = HTTPClient.from_url(url, concurrency=_MAX_CONNECTIONS, **limits)

    def stream(self, body: bytes, record: RequestRecord, now: Callable[[], float]) -> None:
        """Send a request, follow its answer to the end, and note in `record` what came; what went wrong is its `error`.

        Args:
            body: JSON of the request, which asks for a stream.
            now: the clock of the run.
        """
        lines: list[bytes] = []
        times: list[float] = []
        try:
            with self._http.post(self._path, body, _HEADERS) as response:
                if response.status_code == 200:
                    record.accepted_at = now()
                    while line := response.readline(b"\n"):
                        if line.startswith(b"data:"):
                            times.append(now())
                            lines.append(line)
                else:
                    record.error = f"HTTP {response.status_code}: {_message(response.read())[:_MAX_SHOWN]}"
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


def _message(body: bytes) -> str:
    """What a refusal says, in OpenAI's shape or any other."""
    try:
        return str(decode(body, Any, "")["error"]["message"])
    except (LoadTestError, KeyError, TypeError):
        return body.decode(errors="replace")
