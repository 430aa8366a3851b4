"""Machines: published figures of some, and this one, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, inf

import numpy as np

from shoal.model.backends.cores import num_cores
from shoal.server.engine.memory import free_memory

_LEAST_BYTES, _MOST_BYTES = 1 << 22, 1 << 29  # of the memory that is read
_MIN_TURNS = 3


@dataclass(frozen=True)
class Machine:
    """What the roofline needs to know.

    Attributes:
        flops: FLOP/s of dense products by number format.
        bandwidth: bytes/s of memory.
        memory: bytes.
        link: bytes/s that a chip sends to others of its kind; None if it has no others.
    """

    name: str
    flops: dict[str, float]
    bandwidth: float
    memory: float
    link: float | None


# TFLOP/s in float32 and in both 16-bit formats, GB/s and GB of memory, and GB/s of links in one direction.  From data
# sheets, for products without sparsity.
_CHIPS = {
    "a100": (19.5, 312, 2039, 80, 300),  # SXM, NVLink 3
    "h100": (67, 989, 3350, 80, 450),  # SXM, NVLink 4
    "h200": (67, 989, 4800, 141, 450),
    "b200": (75, 2250, 8000, 180, 900),  # NVLink 5
    "mi300x": (163.4, 1307, 5300, 192, 448),
    "l4": (30.3, 121, 300, 24, 32),  # PCIe 4, as those that follow
    "l40s": (91.6, 362, 864, 48, 32),
    "rtx3090": (35.6, 71, 936, 24, 32),
    "rtx4090": (82.6, 165.2, 1008, 24, 32),
}
MACHINES = {
    name: Machine(
        name,
        {"float32": single * 1e12, "bfloat16": half * 1e12, "float16": half * 1e12},
        bandwidth * 1e9,
        memory * 1e9,
        link * 1e9,
    )
    for name, (single, half, bandwidth, memory, link) in _CHIPS.items()
}


def measure_machine(num_bytes: float, seconds: float) -> Machine:
    """This machine's CPU, in float32: the best of some products, and of some readings of `num_bytes`.

    What a step reads may fit into the CPU's caches, so that the measurement reads as much as a step.  Products are so
    small that BLAS has one thread compute them, whose own time counts: other programs cannot make it longer.  All cores
    together may be slower than one times their number, which is right for a bound.

    Args:
        seconds: of each of the two measurements.
    """
    threads = num_cores()
    size = int(min(max(num_bytes, _LEAST_BYTES), _MOST_BYTES))
    vectors = [np.ones(ceil(size / threads / 8), np.float32) for _ in range(2 * threads)]
    left, right, result = (np.ones((16, 64, 64), np.float32) for _ in range(3))
    with ThreadPoolExecutor(threads) as pool:
        reading = least_seconds(lambda: list(pool.map(np.dot, vectors[:threads], vectors[threads:])), seconds)
    multiplying = least_seconds(partial(np.matmul, left, right, out=result), seconds, time.thread_time)
    flops = threads * 2 * left.size * right.shape[-1] / multiplying
    return Machine(
        f"this machine, {threads} cores",
        {"float32": flops},
        sum(vector.nbytes for vector in vectors) / reading,
        free_memory("cpu"),
        None,
    )


def least_seconds(work: Callable[[], object], seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """The least seconds of a call, by `clock`, of as many as fit into `seconds`, and of three at least."""
    ends, least, turns = time.perf_counter() + seconds, inf, 0
    while turns < _MIN_TURNS or time.perf_counter() < ends:
        began = clock()
        work()
        least, turns = min(least, clock() - began), turns + 1
    return least


def faster(one: Machine, other: Machine) -> Machine:
    """The better of two measurements of this machine, which other load slows at times."""
    flops = {dtype: max(rate, other.flops[dtype]) for dtype, rate in one.flops.items()}
    return replace(one, flops=flops, bandwidth=max(one.bandwidth, other.bandwidth))
