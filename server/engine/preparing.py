"""Requests whose grammars are compiled first, beside the steps of others."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from shoal.model.step.grammars import Grammars
from shoal.model.text.grammar import IDLE_SECONDS
from shoal.server.engine.loop import Wire
from shoal.server.engine.messages import Abort, Command, EngineRequest, Report, Submit

LOOK_SECONDS = 0.002  # between two looks whether a grammar is compiled


class Preparing:
    """A wire around another, which hands a request on when its grammar is compiled, or cannot be.

    What every grammar needs is made when there is nothing else to do for the first time: it holds up the steps.

    Args:
        grammars: of the engine.
    """

    def __init__(self, wire: Wire, grammars: Grammars) -> None:
        self._wire = wire
        self._grammars = grammars
        self._was_idle = False
        self._waiting: dict[str, tuple[EngineRequest, Future[Any]]] = {}

    def send(self, report: Report) -> None:
        self._wire.send(report)

    def receive(self, seconds: float | None) -> list[Command]:
        if self._waiting:
            seconds = LOOK_SECONDS if seconds is None else min(seconds, LOOK_SECONDS)
        is_idle = seconds is None and not self._was_idle
        received = self._wire.receive(IDLE_SECONDS if is_idle else seconds)
        if is_idle and not received:
            self._grammars.prepare_any()
            self._was_idle = True
        commands: list[Command] = []
        for command in received:
            match command:
                case Submit(requests):
                    commands.append(Submit([request for request in requests if not self._waits(request)]))
                    continue
                case Abort(request_ids):
                    for request_id in request_ids:
                        self._waiting.pop(request_id, None)
            commands.append(command)
        ready = [request for request, compiling in self._waiting.values() if compiling.done()]
        for request in ready:
            del self._waiting[request.request_id]
        return [*commands, Submit(ready)] if ready else commands

    def _waits(self, request: EngineRequest) -> bool:
        if request.params.grammar:
            self._waiting[request.request_id] = request, self._grammars.prepare(request.params.grammar)
        return bool(request.params.grammar)
