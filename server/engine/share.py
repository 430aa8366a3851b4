"""What one of several engines, or one of its ranks, gets of the machine that they share."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace

from shoal.model.backends.config import BackendConfig
from shoal.model.backends.cores import num_cores
from shoal.server.settings import Settings


def share(settings: Settings, number: int) -> Settings:
    """The settings of the engine of this number: its part of the cores, and a trace file of its own.

    Its threads stay on no core of their own, which another engine would choose as well.
    """
    engine = settings.engine
    if engine.engines == 1:
        return settings
    threads = engine.threads or max(1, num_cores() // (engine.engines * _num_ranks_here(engine)))
    trace = engine.trace and engine.trace.with_stem(f"{engine.trace.stem}-{number}")
    return replace(settings, engine=replace(engine, threads=threads, pin_threads=False, trace=trace))


def threads_of_rank(config: BackendConfig) -> int:
    """CPU threads of each rank of an engine: those of the settings, or its share of the cores."""
    return config.threads or max(1, num_cores() // _num_ranks_here(config))


def give_way(*, to_engines: bool) -> None:
    """Have this thread, and processes that it starts from now on, interrupt no engine's thread, or be like others.

    A part of a step lasts until the last thread is done with its own.  To Linux who gives way is a batch job
    (sched(7)), which gets its share of the cores, but none at once when it wakes.
    """
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.sched_setscheduler(0, os.SCHED_BATCH if to_engines else os.SCHED_OTHER, os.sched_param(0))


def _num_ranks_here(config: BackendConfig) -> int:
    """Ranks of an engine that share this machine's cores."""
    everywhere = config.tensor_parallel * config.expert_parallel * config.pipeline_parallel
    return everywhere if config.parallel_address is None else 1
