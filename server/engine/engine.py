"""What HTTP knows of an engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from shoal.server.engine.journal import Submission
from shoal.server.engine.messages import EngineRequest, Ready


class Engine(Protocol):
    """Takes requests and streams what comes of them: one process, a thread of this one, or many behind a router."""

    @property
    def ready(self) -> Ready:
        """What the engine said when it had loaded its model, its limits among it.

        Raises:
            EngineUnavailableError: it is not ready, or takes no more requests.
        """
        ...

    @property
    def num_unfinished(self) -> int: ...

    def check_health(self) -> None:
        """Raise EngineUnavailableError unless steps complete, or nothing is asked."""
        ...

    def submit(self, requests: Sequence[EngineRequest]) -> Submission:
        """Take all of these requests or none.  The submission streams their news.

        Raises:
            InvalidRequestError, QueueFullError, EngineUnavailableError: at once, before any work is done.
        """
        ...

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget these requests; the blocks of the unfinished ones are free at the engine's next step."""
        ...
