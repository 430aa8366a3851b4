"""Work on texts and tokens, which may be long, beside the event loop."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
# This many characters or tokens take a few milliseconds at most; more would hold up the event loop.  A text or list
# costs as much as some of them.
INLINE_UNITS, UNITS_OF_EACH = 4096, 16
# More take hundreds of megabytes and seconds: one such work is done at a time, in a thread of its own.
LONG_UNITS = 262_144
_long = ThreadPoolExecutor(1, "shoal-long")


async def off_the_loop(work: Callable[[], T], *sizes: int) -> T:
    """Do what takes the longer the more characters or tokens it is about; in a thread if they are many."""
    size = sum(sizes) + UNITS_OF_EACH * len(sizes)
    if size <= INLINE_UNITS:
        return work()
    if size <= LONG_UNITS:
        return await asyncio.to_thread(work)
    return await asyncio.get_running_loop().run_in_executor(_long, _do_and_tidy, work)


def _do_and_tidy(work: Callable[[], T]) -> T:
    """Do the work, and give the memory that it took back to the system, which the C library (glibc) would keep."""
    done = work()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return done
