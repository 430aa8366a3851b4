"""Arrays that are views of a mapped file."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from shoal.model.numbers import Array


def release(array: Array) -> None:
    """Give back the memory of the array's pages, which are read again if they are touched.

    It does nothing to arrays that are not views of a mapped file.
    """
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    if not isinstance(owner, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = np.frombuffer(owner, np.uint8, 1).ctypes.data
    begin, end = (address - first for address in np.lib.array_utils.byte_bounds(array))
    begin -= begin % mmap.PAGESIZE
    owner.madvise(mmap.MADV_DONTNEED, begin, end - begin)
