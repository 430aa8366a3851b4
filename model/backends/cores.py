"""How many cores there are; apart from what computes on them, which takes long to import."""

from __future__ import annotations

import os


def num_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
