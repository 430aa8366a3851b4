"""First come, first served."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from scheduler.request import Request


class FirstComeFirstServed:
    """Requests are admitted as they arrived; the latest arrival gives way, and nobody overtakes."""

    def order(self, waiting: Collection[Request], now: float) -> Iterable[Request]:
        return waiting

    def admits(self, request: Request, running: Collection[Request], now: float) -> bool:
        return True

    def victim(self, request: Request, running: Collection[Request], now: float) -> Request | None:
        if request not in running:
            return None  # whoever runs came first
        *_, latest = running
        return None if latest is request else latest
