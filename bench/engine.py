"""How long a step takes on each backend, and how much of it is not the forward pass."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from statistics import median

from bench.timing import in_turns
from bench.workload import TimedBackend, make_engine, make_request
from shoal.model.backends.native_library import supported_isas
from shoal.scheduler.engine import EngineCore
from shoal.terminal import show

BATCH_SIZES = (1, 8, 32, 64)
CONTEXT = 256
PREFILL = 512
NUM_TURNS = 5


def run(checkpoint: Path, *, steps: int, **_: object) -> dict[str, object]:
    """Time decode and prefill steps on each backend, in turns; print a table."""
    backends = ["native", "torch"] if supported_isas() else ["torch"]
    engines = [make_engine(checkpoint, ["--backend", name, "--no-enable-prefix-caching"]) for name in backends]
    rows: list[dict[str, object]] = []
    ratios: dict[str, float] = {}
    for size in (*BATCH_SIZES, 0):  # 0 is a prefill
        name = f"decode {size}" if size else f"prefill {PREFILL}"
        in_a_row = max(1, steps // NUM_TURNS // (1 if size else 10))
        for engine in engines:
            _begin(*engine, size, NUM_TURNS * (in_a_row + 1))
        works = [partial(_step, *engine, prefills=not size) for engine in engines]
        times = in_turns(works, NUM_TURNS, in_a_row=in_a_row, pause=0.02)
        for core, _timed in engines:
            _abort_all(core)
        seconds = [median(whole for whole, _inside in found) for found in times]
        for backend, whole, found in zip(backends, seconds, times, strict=True):
            outside = median(whole - inside for whole, inside in found) * 1e6
            speed = {"ms": whole * 1e3, "tokens/s": (size or PREFILL) / whole}
            rows.append({"step": name, "backend": backend, **speed, "outside us": outside})
        ratios[name] = seconds[-1] / seconds[0]
    show(f"engine: median step, context {CONTEXT}; outside = schedule + build + update", rows)
    show(f"engine: time of {backends[-1]} / time of {backends[0]}", [ratios])
    return {"engine": rows, "engine_ratios": ratios}


def _begin(core: EngineCore, timed: TimedBackend, batch_size: int, num_steps: int) -> None:
    """Let `batch_size` requests decode; within `num_steps` steps from now their mean context is CONTEXT tokens."""
    num_prompt_tokens = max(2, CONTEXT - num_steps // 2)
    for index in range(batch_size):
        core.scheduler.add(make_request(f"{index}", num_prompt_tokens, 2 * num_steps, timed.backend.vocab_size))
    timed.chooses_all = not batch_size
    while not timed.chooses_all:  # some request still computes its prompt
        core.step()


def _step(core: EngineCore, timed: TimedBackend, *, prefills: bool) -> tuple[float, float]:
    """Return the seconds of a step, and of it inside the backend; with `prefills` it computes a new prompt."""
    if prefills:
        core.scheduler.add(make_request("prefill", PREFILL, 2, timed.backend.vocab_size))
    began = time.perf_counter()
    core.step()
    whole = time.perf_counter() - began
    if prefills:
        _abort_all(core)
    return whole, timed.seconds


def _abort_all(core: EngineCore) -> None:
    for request_id in [*core.scheduler.running, *core.scheduler.waiting]:
        core.scheduler.abort(request_id)
    core.step()
