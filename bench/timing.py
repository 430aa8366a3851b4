"""Times of several kinds of work in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def in_turns(
    works: Sequence[Callable[[], T]], num_turns: int, *, in_a_row: int = 1, pause: float = 0.0
) -> list[list[T]]:
    """Return what each kind of work returns in all turns, so that other load on the machine slows all kinds alike.

    Args:
        in_a_row: results of each kind in a turn.  One more call before them fills the CPU's caches.
        pause: seconds before each kind, in which the threads of the one before stop spinning.
    """
    results: list[list[T]] = [[] for _ in works]
    for _ in range(num_turns):
        for work, found in zip(works, results, strict=True):
            time.sleep(pause)
            work()
            found += [work() for _ in range(in_a_row)]
    return results


def seconds(work: Callable[[], object]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
