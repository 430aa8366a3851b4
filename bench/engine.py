"""How long a step takes, and how much of it is not the forward pass."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

from bench.table import show
from bench.workload import TimedBackend, make_engine, make_request
from scheduler.engine import EngineCore
from scheduler.request import Request

BATCH_SIZES = (1, 8, 32, 64)
CONTEXT = 256
PREFILL = 512


def run(checkpoint: Path, num_steps: int) -> dict[str, object]:
    """Time decode steps at several batch sizes, and prefill steps; print a table.

    The time outside the forward pass is measured twice: as it is, between two forward passes, which leave little of
    the scheduler's code and data in the CPU's caches; and alone, with a forward pass that computes nothing.
    """
    core, backend = make_engine(checkpoint, ["--no-enable-prefix-caching"])
    rows = [_decode(core, backend, batch_size, num_steps) for batch_size in BATCH_SIZES]
    rows.append(_prefill(core, backend, max(num_steps // 10, 5)))
    show(f"engine: median step, context {CONTEXT}; outside = schedule + build + update", rows)
    return {"engine": rows}


def _decode(core: EngineCore, backend: TimedBackend, batch_size: int, num_steps: int) -> dict[str, object]:
    """Steps in which each of `batch_size` requests decodes one token, around a context of CONTEXT tokens."""
    begin = CONTEXT - num_steps // 2
    for index in range(batch_size):
        core.scheduler.add(make_request(f"{batch_size}-{index}", begin, 2 * num_steps + 100, backend.vocab_size))
    while any(request.num_output_tokens < 5 for request in _all_requests(core)):
        core.step()
    times = [_timed_step(core, backend) for _ in range(num_steps)]
    backend.computes = False
    alone = [_timed_step(core, backend) for _ in range(num_steps)]
    backend.computes = True
    _abort_all(core)
    return _row(f"decode {batch_size}", batch_size, times, alone)


def _prefill(core: EngineCore, backend: TimedBackend, num_steps: int) -> dict[str, object]:
    """Steps that compute one prompt of PREFILL tokens each."""
    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for index in range(2 * num_steps + 2):
        backend.computes = index % 2 == 0
        core.scheduler.add(make_request(f"prefill-{index}", PREFILL, 2, backend.vocab_size))
        times[backend.computes].append(_timed_step(core, backend))
        _abort_all(core)
    backend.computes = True
    return _row(f"prefill {PREFILL}", PREFILL, times[True][1:], times[False][1:])


def _timed_step(core: EngineCore, backend: TimedBackend) -> tuple[float, float]:
    """Seconds of a whole step, and of it inside the backend."""
    began = time.perf_counter()
    core.step()
    return time.perf_counter() - began, backend.seconds


def _row(
    name: str, num_tokens: int, times: list[tuple[float, float]], alone: list[tuple[float, float]]
) -> dict[str, object]:
    step = median(whole for whole, _ in times)
    return {
        "step": name,
        "ms": step * 1e3,
        "tokens/s": num_tokens / step,
        "outside us": median(whole - inside for whole, inside in times) * 1e6,
        "outside us, alone": median(whole - inside for whole, inside in alone) * 1e6,
    }


def _all_requests(core: EngineCore) -> list[Request]:
    return [*core.scheduler.running.values(), *core.scheduler.waiting.values()]


def _abort_all(core: EngineCore) -> None:
    for request_id in [*core.scheduler.running, *core.scheduler.waiting]:
        core.scheduler.abort(request_id)
    core.step()
