"""What is told of an API call when its choices have ended, and it with them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from shoal.server.engine.journal import Journal
from shoal.server.service import Service
from shoal.server.wire.requests import ChatBody, CompletionBody


class Account:
    """Tells the metrics of a call."""

    def __init__(self, service: Service, body: CompletionBody | ChatBody) -> None:
        self._metrics = service.metrics
        self._n = body.n

    def finish(self, choice: Journal, reason: str) -> None:
        """A choice has ended."""
        choice.finish_reason = reason
        self._metrics.finished(choice, reason, time.monotonic())

    def end(self, choices: Sequence[Journal], failure: Exception | None) -> None:
        """The call has ended, and with it the choices that had not: with the failure, or because nobody wants them."""
        for choice in choices:
            if choice.finish_reason is None:
                self.finish(choice, "abort" if failure is None else "error")
        for first in range(0, len(choices), self._n):
            self._metrics.answered(choices[first : first + self._n])
