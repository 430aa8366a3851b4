"""What a scheduling policy answers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

from scheduler.request import Request


class Policy(Protocol):
    """Orders the waiting, says who may be admitted, and names the victim.

    It answers and never acts: token budget, blocks and preemption belong to the scheduler.  `running` is in the
    order of admission, `waiting` in the order of arrival with preempted requests first.
    """

    def order(self, waiting: Collection[Request], now: float) -> Iterable[Request]:
        """The waiting requests, first to be admitted first; read lazily and only while there is room."""
        ...

    def admits(self, request: Request, running: Collection[Request], now: float) -> bool:
        """Whether this waiting request may join the batch now; if not, the next in order is asked about."""
        ...

    def victim(self, request: Request, running: Collection[Request], now: float) -> Request | None:
        """Which running request to preempt so that `request` gets blocks; None if `request` itself must give way."""
        ...
