"""How long a step takes on each backend, and how much of it is not the forward pass."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

from bench.table import show
from bench.workload import TimedBackend, make_engine, make_request
from shoal.model.backends.native_library import supported_isas
from shoal.scheduler.engine import EngineCore
from shoal.scheduler.request import Request

BATCH_SIZES = (1, 8, 32, 64)
CONTEXT = 256
PREFILL = 512
# Turns of each engine: what else happens on the machine then happens to all of them.
NUM_TURNS = 5


@dataclass
class Times:
    """Seconds of whole steps and of the backend within them, and of steps around a backend that computes nothing."""

    steps: list[tuple[float, float]] = field(default_factory=list)
    alone: list[tuple[float, float]] = field(default_factory=list)

    @property
    def step(self) -> float:
        return median(whole for whole, _ in self.steps)

    def row(self, name: str, backend: str, num_tokens: int) -> dict[str, object]:
        return {
            "step": name,
            "backend": backend,
            "ms": self.step * 1e3,
            "tokens/s": num_tokens / self.step,
            "outside us": median(whole - inside for whole, inside in self.steps) * 1e6,
            "outside us, alone": median(whole - inside for whole, inside in self.alone) * 1e6,
        }


def run(checkpoint: Path, num_steps: int) -> dict[str, object]:
    """Time decode and prefill steps on each backend, in turns; print a table.

    The time outside the forward pass is measured twice: as it is, between two forward passes, which leave little of
    the scheduler's code and data in the CPU's caches; and alone, with a forward pass that computes nothing.
    """
    backends = ["native", "torch"] if supported_isas() else ["torch"]
    engines = [make_engine(checkpoint, ["--backend", name, "--no-enable-prefix-caching"]) for name in backends]
    rows: list[dict[str, object]] = []
    ratios: dict[str, object] = {}
    for batch_size in (*BATCH_SIZES, 0):
        name = f"decode {batch_size}" if batch_size else f"prefill {PREFILL}"
        works: list[_Work] = [
            _Decode(core, backend, batch_size, num_steps) if batch_size else _Prefill(core, backend)
            for core, backend in engines
        ]
        times = _in_turns(works, num_steps if batch_size else max(num_steps // 10, NUM_TURNS))
        rows += [t.row(name, backend, batch_size or PREFILL) for t, backend in zip(times, backends, strict=True)]
        ratios[name] = times[-1].step / times[0].step
    show(f"engine: median step, context {CONTEXT}; outside = schedule + build + update", rows)
    show(f"engine: {backends[0]} is so many times as fast as {backends[-1]}", [ratios])
    return {"engine": rows, "engine_ratios": ratios}


class _Work(Protocol):
    backend: TimedBackend

    def step(self) -> tuple[float, float]: ...

    def end(self) -> None: ...


def _in_turns(works: list[_Work], num_steps: int) -> list[Times]:
    """Time `num_steps` steps of each, and as many that compute nothing."""
    times = [Times() for _ in works]
    for _ in range(NUM_TURNS):
        for work, found in zip(works, times, strict=True):
            time.sleep(0.02)  # the other's threads have stopped spinning by then
            for work.backend.computes, steps in ((False, found.alone), (True, found.steps)):
                work.step()  # finds the caches full of what ran before
                steps += [work.step() for _ in range(num_steps // NUM_TURNS)]
    for work in works:
        work.end()
    return times


class _Decode:
    """Each of `batch_size` requests decodes one token a step, around a context of CONTEXT tokens."""

    def __init__(self, core: EngineCore, backend: TimedBackend, batch_size: int, num_steps: int) -> None:
        self.core, self.backend = core, backend
        backend.computes = True
        for index in range(batch_size):
            request_id = f"{batch_size}-{index}"
            core.scheduler.add(make_request(request_id, CONTEXT - num_steps, 3 * num_steps, backend.vocab_size))
        while any(request.num_output_tokens < 2 for request in _all_requests(core)):
            core.step()

    def step(self) -> tuple[float, float]:
        return _timed_step(self.core, self.backend)

    def end(self) -> None:
        _abort_all(self.core)


class _Prefill:
    """Each step computes a prompt of PREFILL tokens."""

    def __init__(self, core: EngineCore, backend: TimedBackend) -> None:
        self.core, self.backend = core, backend
        self.num_steps = 0

    def step(self) -> tuple[float, float]:
        self.num_steps += 1
        request = make_request(f"prefill-{self.num_steps}", PREFILL, 2, self.backend.vocab_size)
        self.core.scheduler.add(request)
        times = _timed_step(self.core, self.backend)
        _abort_all(self.core)
        return times

    def end(self) -> None:
        """Nothing is left."""


def _timed_step(core: EngineCore, backend: TimedBackend) -> tuple[float, float]:
    """Seconds of a whole step, and of it inside the backend."""
    began = time.perf_counter()
    core.step()
    return time.perf_counter() - began, backend.seconds


def _all_requests(core: EngineCore) -> list[Request]:
    return [*core.scheduler.running.values(), *core.scheduler.waiting.values()]


def _abort_all(core: EngineCore) -> None:
    for request_id in [*core.scheduler.running, *core.scheduler.waiting]:
        core.scheduler.abort(request_id)
    core.step()
