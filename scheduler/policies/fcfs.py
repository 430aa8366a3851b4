"""First come, first served."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import chain

from shoal.scheduler.policies.policy import Policy
from shoal.scheduler.request import Request


class FirstComeFirstServed(Policy):
    """Requests are admitted as they arrived; the latest arrival gives way, and nobody overtakes."""

    name = "fcfs"

    def order(self, running: Collection[Request], waiting: Collection[Request], now: float) -> Iterable[Request]:
        return chain(running, waiting)

    def victim(self, request: Request, running: Collection[Request], now: float) -> Request | None:
        if request not in running:
            return None  # all running requests came before it
        *_, latest = running
        return None if latest is request else latest
