"""Requests wait for their grammars beside the engine's steps."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, cast

from shoal.model.step.grammars import Grammars
from shoal.model.text.grammar import IDLE_SECONDS
from shoal.scheduler.output import SamplingParams
from shoal.server.engine.messages import Abort, Command, EngineRequest, Report, Stop, Submit
from shoal.server.engine.preparing import LOOK_SECONDS, Preparing


class FakeWire:
    """Has batches of commands, and notes how long it was to wait for each."""

    def __init__(self, *commands: list[Command]) -> None:
        self.commands = list(commands)
        self.waits: list[float | None] = []

    def send(self, report: Report) -> None: ...

    def receive(self, seconds: float | None) -> list[Command]:
        self.waits.append(seconds)
        return self.commands.pop(0) if self.commands else []


def submit(*names: str) -> Submit:
    """Requests, of which those with capital letters have a grammar."""
    return Submit(
        [
            EngineRequest(name, [1], SamplingParams(max_tokens=1, seed=0, grammar=name if name.isupper() else ""))
            for name in names
        ]
    )


def names(commands: list[Command]) -> list[Any]:
    return [
        [request.request_id for request in command.requests] if isinstance(command, Submit) else type(command)
        for command in commands
    ]


class FakeGrammars:
    """Compiles when the test says so."""

    def __init__(self) -> None:
        self.compiling: dict[str, Future[Any]] = {}
        self.num_prepared = 0

    def prepare(self, grammar: str) -> Future[Any]:
        return self.compiling.setdefault(grammar, Future())

    def prepare_any(self) -> None:
        self.num_prepared += 1


def prepared(wire: FakeWire) -> tuple[Preparing, FakeGrammars]:
    grammars = FakeGrammars()
    return Preparing(wire, cast(Grammars, grammars)), grammars


def test_a_request_comes_when_its_grammar_is_there_and_holds_up_nobody() -> None:
    wire = FakeWire([submit("a", "B", "C")], [submit("d")], [], [Abort(["C"])], [Stop()])
    preparing, grammars = prepared(wire)
    compiling = grammars.compiling
    assert names(preparing.receive(None)) == [["a"]]
    assert names(preparing.receive(None)) == [["d"]]
    compiling["B"].set_exception(ValueError("what is wrong is told by who asks for it"))
    assert names(preparing.receive(0.0)) == [["B"]]
    assert names(preparing.receive(0.1)) == [Abort]
    compiling["C"].set_result(None)
    assert names(preparing.receive(7.0)) == [Stop]
    assert wire.waits == [IDLE_SECONDS, LOOK_SECONDS, 0.0, LOOK_SECONDS, 7.0]


def test_a_grammar_that_is_there_costs_no_turn() -> None:
    preparing, grammars = prepared(FakeWire([submit("A")]))
    grammars.compiling["A"] = Future()
    grammars.compiling["A"].set_result(None)
    assert names(preparing.receive(None)) == [[], ["A"]]


def test_what_every_grammar_needs_is_made_once_when_there_is_nothing_else_to_do() -> None:
    wire = FakeWire([submit("a")], [], [], [], [])
    preparing, grammars = prepared(wire)
    for seconds in (None, 0.0, 0.1):
        preparing.receive(seconds)
    assert grammars.num_prepared == 0
    for _ in range(2):
        preparing.receive(None)
    assert grammars.num_prepared == 1
    assert wire.waits == [IDLE_SECONDS, 0.0, 0.1, IDLE_SECONDS, None]
