"""A fake of the server, as far as a load generator sees it: it streams as many words as a request is to have tokens."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

from tests.clients.fake_server import Answer, FakeServer, sse


class StreamingServer(FakeServer):
    """Answers every completion, after a while, until it is told to die.

    Args:
        seconds: before each answer.
        dies_after: so many requests are answered; then each connection is cut, and nobody listens any more.

    Attributes:
        most_at_once: requests that were unanswered at the same time.
    """

    def __init__(self, *, seconds: float = 0.0, dies_after: int | None = None) -> None:
        self.most_at_once = 0
        self._seconds = seconds
        self._dies_after = dies_after
        self._num_unanswered = 0
        self._num_answered = 0
        self._lock = threading.Lock()
        super().__init__()

    def next_answer(self) -> Answer:
        body = self.requests[-1].body
        with self._lock:
            self._num_unanswered += 1
            self.most_at_once = max(self.most_at_once, self._num_unanswered)
        time.sleep(self._seconds)
        with self._lock:
            self._num_unanswered -= 1
            self._num_answered += 1
            if self._dies_after is not None and self._num_answered > self._dies_after:
                self._stop_listening()
                return Answer(content_type="text/event-stream", ending="cut")
        num_tokens = body["end_after"] if body else 1
        pieces = [sse(event) for event in completion_events(["word "] * (num_tokens - 1))]
        return Answer(content_type="text/event-stream", pieces=[*pieces, b"data: [DONE]\n\n"])

    def _stop_listening(self) -> None:
        self._http.socket.close()


def completion_events(texts: list[str], **usage: int) -> list[dict[str, Any]]:
    """The events of a streamed completion: an event a text, the end, and the usage."""
    head = {"id": "cmpl-7", "object": "text_completion", "created": 1, "model": "shoal"}
    deltas: list[tuple[str, str | None]] = [*((text, None) for text in texts), ("", "stop")]
    counts = {"prompt_tokens": 5, "completion_tokens": len(deltas), "total_tokens": 5 + len(deltas)} | usage
    return [
        *(
            head | {"choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}], "usage": None}
            for text, reason in deltas
        ),
        head | {"choices": [], "usage": counts},
    ]


def closed_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
