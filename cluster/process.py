"""The engine process of a replica: `python -m shoal.cluster.process`, what it is to be as JSON on standard input.

It says on standard output what it does and where it listens, a JSON object a line, and ends with standard input.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from importlib.metadata import version
from typing import Any

import msgspec

from shoal.cluster.gateway import Gateway
from shoal.cluster.messages import Listening, Load, Report, Welcome
from shoal.cluster.secret import Keys
from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.scheduler.engine import EngineCore
from shoal.scheduler.errors import ShoalError
from shoal.server.engine.build import build_engine
from shoal.server.engine.loop import EngineLoop, Wire
from shoal.server.engine.messages import Command, Loading, StartFailed
from shoal.server.engine.messages import Report as EngineReport
from shoal.server.engine.preparing import Preparing
from shoal.server.engine.process import give_up
from shoal.server.fingerprint import fingerprint
from shoal.server.settings import resolve

LOAD_SECONDS = 0.5  # between two reports of how loaded the engine is


class Order(msgspec.Struct):
    """What the process is to be: its settings by sections, the host on which it listens, and the cluster's secret."""

    sections: dict[str, Any]
    host: str
    secret: str


def _tell(report: Report) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.buffer.flush()


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os._exit(0)


class _Reporting:
    """A wire around another, which tells the replica how loaded the engine is."""

    def __init__(self, wire: Wire, core: EngineCore) -> None:
        self._wire = wire
        self._core = core
        self._told_at = 0.0

    def send(self, report: EngineReport) -> None:
        self._wire.send(report)

    def receive(self, seconds: float | None) -> list[Command]:
        now = self._core.clock()
        if seconds is None or now - self._told_at >= LOAD_SECONDS:
            self._told_at = now
            scheduler = self._core.scheduler
            oldest = min((request.arrival_time for request in scheduler.waiting.values()), default=now)
            stats = scheduler.stats()
            _tell(Load(now - oldest, stats.kv_cache_usage, stats.num_running + stats.num_waiting))
        return self._wire.receive(seconds)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    settings = resolve(order.sections)
    try:
        engine = build_engine(settings, lambda what: _tell(Loading(what)), give_up)
        own = fingerprint(resolve_checkpoint(settings.model), settings)
        gateway = Gateway(
            order.host,
            Keys.of(order.secret),
            Welcome(version("shoal"), own, engine.ready, engine.core.scheduler.stats()),
        )
    except ShoalError as error:
        _tell(StartFailed(error.message, error.param))
        sys.exit(1)
    gc.collect()
    gc.freeze()  # what is loaded stays; no collection need look at it again
    _tell(Listening(gateway.port, own))
    EngineLoop(engine.core, Preparing(_Reporting(gateway, engine.core), engine.grammars)).run()


if __name__ == "__main__":
    main()
