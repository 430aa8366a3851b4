"""A scripted HTTP server: it records every request and plays the answers it was given, failures included.

It speaks HTTP/1.1 over real sockets and writes chunked bodies piece by piece, so that a test decides where the network
cuts them.
"""

from __future__ import annotations

import json
import select
import socket
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATIENCE = 120.0  # seconds that anything may take on a busy machine; no test measures time


@dataclass
class Recorded:
    """A request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    client: tuple[str, int]


@dataclass
class Answer:
    """What to send: the pieces of a body, then its proper end, a cut of the connection, or silence until it closes."""

    status: int = 200
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)
    ending: str = "end"  # or "cut", "silence"


class FakeServer:
    """Serves on a free port from construction to `close`.

    Attributes:
        requests: all that arrived, in order.
        disconnected: set when a client closes the connection of an answer that ends in silence.
    """

    def __init__(self) -> None:
        self.requests: list[Recorded] = []
        self.disconnected = threading.Event()
        self._answers: deque[Answer] = deque()
        self._http = _Http(self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def next_answer(self) -> Answer:
        return self._answers.popleft()

    def answer(self, answer: Answer) -> None:
        self._answers.append(answer)

    def json(self, value: Any, *, status: int = 200, **headers: str) -> None:
        """Answer with JSON; `Retry_After="1"` becomes a Retry-After header."""
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        self.answer(Answer(status=status, headers=named, pieces=[json.dumps(value).encode()]))

    def error(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, **headers: str
    ) -> None:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.json(error_body(message, type=kind, param=None, code=code), status=status, **headers)

    def stream(
        self, *events: Any, done: bool = True, ending: str = "end", first: int | None = None, **headers: str
    ) -> None:
        """Answer with an event stream, one network write an event.

        Args:
            first: number of the first event, if they have ids.
        """
        pieces = [sse(event) for event in events] + ([b"data: [DONE]\n\n"] if done else [])
        if first is not None:
            pieces = [b"id: cmpl-1:%d\n%b" % (number, piece) for number, piece in enumerate(pieces, first)]
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        self.answer(Answer(200, "text/event-stream; charset=utf-8", named, pieces, ending))


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, fake: FakeServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fake = fake

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up early is part of the script."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._serve(None)

    def do_DELETE(self) -> None:
        self._serve(None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        is_json = self.headers["Content-Type"] == "application/json"
        self._serve(json.loads(body) if is_json else body or None)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self, body: Any) -> None:
        assert isinstance(self.server, _Http)
        fake = self.server.fake
        headers = {name.lower(): value for name, value in self.headers.items()}
        fake.requests.append(Recorded(self.command, self.path, headers, body, self.client_address))
        answer = fake.next_answer()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Transfer-Encoding", "chunked")
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        for piece in answer.pieces:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if answer.ending == "silence":
            self._await_disconnect(fake)
        elif answer.ending == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def _await_disconnect(self, fake: FakeServer) -> None:
        self.close_connection = True
        readable, _, _ = select.select([self.connection], [], [], PATIENCE)
        if readable and not self.connection.recv(1):
            fake.disconnected.set()


def sse(event: Any) -> bytes:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()


def error_body(
    message: str, *, type: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 2,
    "total_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"accepted_prediction_tokens": 1, "rejected_prediction_tokens": 3},
}


def completion(*texts: str, **fields: Any) -> dict[str, Any]:
    """The body of a whole completion, one choice a text."""
    choices = [{"index": i, "text": text, "finish_reason": "stop", "logprobs": None} for i, text in enumerate(texts)]
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1700000000, "model": "shoal"}
    return {**head, "choices": choices, "usage": USAGE, **fields}


def chat_completion(text: str, **choice_fields: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": None, **choice_fields}
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1700000000, "model": "shoal"}
    return {**head, "choices": [choice], "usage": USAGE}


def completion_chunks(*texts: str, **fields: Any) -> list[dict[str, Any]]:
    """The events of a streamed completion: the texts, the end, the usage."""
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1700000000, "model": "shoal", **fields}
    deltas = [*((text, None) for text in texts), ("", "stop")]
    return [
        *(
            {**head, "choices": [{"index": 0, "text": text, "finish_reason": reason, "logprobs": None}]}
            for text, reason in deltas
        ),
        {**head, "choices": [], "usage": USAGE},
    ]


def chat_chunks(*texts: str) -> list[dict[str, Any]]:
    """The events of a streamed chat answer: the role, the texts, the end, the usage."""
    return chat_deltas(*({"content": text} for text in texts))


def chat_deltas(*deltas: dict[str, Any], finish_reason: str = "stop") -> list[dict[str, Any]]:
    """`chat_chunks` of any deltas."""
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1700000000, "model": "shoal"}
    told: list[tuple[dict[str, Any], str | None]] = [
        ({"role": "assistant", "content": ""}, None),
        *((delta, None) for delta in deltas),
        ({}, finish_reason),
    ]
    return [
        *(
            {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]}
            for delta, reason in told
        ),
        {**head, "choices": [], "usage": USAGE},
    ]
