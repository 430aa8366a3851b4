"""What one of several engines gets of the machine that they share."""

from __future__ import annotations

from dataclasses import replace

from shoal.model.backends.native_backend import num_cores
from shoal.server.engine.ranks import num_ranks_here
from shoal.server.settings import Settings


def share(settings: Settings, number: int) -> Settings:
    """The settings of the engine of this number: its part of the cores, and a trace file of its own.

    Its threads stay on no core of their own, which another engine would choose as well.
    """
    engine = settings.engine
    if engine.engines == 1:
        return settings
    threads = engine.threads or max(1, num_cores() // (engine.engines * num_ranks_here(engine)))
    trace = engine.trace and engine.trace.with_stem(f"{engine.trace.stem}-{number}")
    return replace(settings, engine=replace(engine, threads=threads, pin_threads=False, trace=trace))
