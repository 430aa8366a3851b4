"""First come, first served."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from shoal.scheduler.policies.policy import Policy
from shoal.scheduler.request import Request


class FirstComeFirstServed(Policy):
    """Requests are admitted as they arrived; the latest arrival gives way, and nobody overtakes."""

    name = "fcfs"

    def order(self, requests: Collection[Request], now: float) -> Iterable[Request]:
        return requests

    def victim(self, request: Request, running: Collection[Request], now: float) -> Request | None:
        if request not in running:
            return None  # all running requests came before it
        *_, latest = running
        return None if latest is request else latest
