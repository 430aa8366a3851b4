"""What HTTP knows of an engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf
from typing import Protocol

from shoal.server.engine.journal import Journal
from shoal.server.engine.messages import EngineRequest, Ready
from shoal.server.engine.submission import Submission


class Engine(Protocol):
    """Takes requests and streams what comes of them: one process, a thread of this one, or many behind a router."""

    @property
    def ready(self) -> Ready:
        """What the engine said when it had loaded its model, its limits among it.

        Raises:
            EngineUnavailableError: it is not ready, or takes no more requests.
        """

    def journals(self) -> list[Journal]:
        """Those of the unfinished requests, in order of arrival."""

    def check_health(self) -> None:
        """Raise EngineUnavailableError unless steps complete, or nothing is asked."""

    def check_room(self) -> None:
        """Raise what `submit` would raise for any request."""

    def submit(self, requests: Sequence[EngineRequest], timeout: float = inf) -> Submission:
        """Take all of these requests or none.  The submission streams their news, for so many seconds at most.

        Raises:
            InvalidRequestError, QueueFullError, EngineUnavailableError: at once, before any work is done.
        """

    def forget_prefixes(self) -> None:
        """Have no later request find a prefix of an earlier one."""

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget these requests; the blocks of the unfinished ones are free at the engine's next step."""
