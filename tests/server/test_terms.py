"""The time that a request says it has, and that nothing is left of it when it ends."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.requests import Request

from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import EngineError, InvalidRequestError
from shoal.scheduler.output import FinishReason, RequestOutput, SchedulerStats
from shoal.server.engine.messages import Command, News, Ready
from shoal.server.errors import RequestTimeoutError
from shoal.server.generation import Generation
from shoal.server.limits import UNLIMITED
from shoal.server.service import Service
from shoal.server.settings import resolve
from shoal.server.setup import build_service
from shoal.server.terms import Terms, resolve_terms
from shoal.server.wire.parsing import parse_body
from shoal.server.wire.requests import CompletionBody
from tests.e2e.checkpoints import cycle_checkpoint

SERVICE = cast(Service, SimpleNamespace(api_keys=(), allowances={}, settings=resolve({}), tracer=None))


def terms(header: str | None, **fields: Any) -> Terms:
    headers = [] if header is None else [(b"x-request-timeout", header.encode())]
    body = parse_body(CompletionBody, json.dumps({"prompt": "a"} | fields).encode())
    return resolve_terms(SERVICE, Request({"type": "http", "headers": headers}), body)


def test_the_smaller_time_counts() -> None:
    assert terms(None) == Terms()
    assert terms(None).allowance is UNLIMITED
    assert terms("2.5").timeout == terms("2.5", timeout=3).timeout == terms("3", timeout=2.5).timeout == 2.5
    assert terms(None, timeout=7).timeout == 7


@pytest.mark.parametrize("header", ["0", "-1", "nan", "inf", "86401", "soon", ""])
def test_a_time_that_makes_no_sense_is_refused(header: str) -> None:
    with pytest.raises(InvalidRequestError, match="x-request-timeout: expected seconds, above 0 and at most 86400"):
        terms(header)


@pytest.mark.parametrize("end", ["answers", "leaves", "fails", "late"])
def test_no_timer_is_left_behind(end: str, tmp_path: Path) -> None:
    commands: list[Command] = []

    async def scene() -> None:
        service, client = build_service(resolve({"model": str(cycle_checkpoint(tmp_path / "cycle"))}))
        limits = SchedulerConfig(num_blocks=64, max_model_len=512)
        client.connect(Ready(limits, 1, 2, "by hand", None), commands.append)
        body = parse_body(CompletionBody, b'{"prompt": "Z", "n": 2}')
        generation = Generation(
            service, body, [("Z", [5])], "", api_id="a", seed=1, terms=Terms(timeout=0.01 if end == "late" else 1000)
        )
        timer = generation._submission.timer
        assert timer is not None and not timer.cancelled()
        waiting = asyncio.ensure_future(generation.complete())
        await asyncio.sleep(0)
        match end:
            case "answers":
                outputs = [RequestOutput(f"a-0-{i}", [7], FinishReason.STOP) for i in range(2)]
                client.take(News(outputs, SchedulerStats(0, 0, 0.0, 0, 0, 0)))
                await waiting
            case "leaves":
                waiting.cancel()
                await asyncio.wait([waiting])
            case "fails":
                client.give_up(EngineError("no engine"))
                with pytest.raises(EngineError):
                    await waiting
            case "late":
                with pytest.raises(RequestTimeoutError):
                    await waiting
        assert timer.cancelled()
        assert client.num_unfinished == 0

    asyncio.run(scene())
