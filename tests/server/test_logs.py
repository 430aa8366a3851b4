"""What the server logs, and in which shape."""

from __future__ import annotations

import asyncio
import json
import logging
import sys

import pytest

from shoal.scheduler.output import SchedulerStats
from shoal.server.logs import JsonLines, TextLines, is_news
from shoal.server.metrics import Metrics
from shoal.server.serve import log_statistics


def record(level: int = logging.INFO, message: str = "%d fish", *args: object) -> logging.LogRecord:
    return logging.LogRecord("shoal", level, "file", 1, message, args or (3,), None)


def test_lines_for_people() -> None:
    assert TextLines(colour=False).format(record()).endswith(" INFO shoal: 3 fish")
    assert "\x1b" not in TextLines(colour=True).format(record())
    assert TextLines(colour=True).format(record(logging.ERROR)).startswith("\x1b[31m")


def test_lines_of_json() -> None:
    line = json.loads(JsonLines().format(record(logging.WARNING, "größer %s", "\n")))
    assert line.pop("time").endswith("Z")
    assert line == {"level": "warning", "logger": "shoal", "message": "größer \n"}
    failed = record()
    try:
        raise ValueError("why")
    except ValueError:
        failed.exc_info = sys.exc_info()
    assert "ValueError: why" in json.loads(JsonLines().format(failed))["exception"]


def test_health_checks_and_metrics_leave_no_line() -> None:
    access = logging.getLogger("uvicorn.access")
    paths = ["/health", "/v1/models", "/live"]
    lines = [access.makeRecord("uvicorn.access", 20, "", 0, "%s %s %s", ("a", "GET", path), None) for path in paths]
    assert [is_news(line) for line in lines] == [False, True, False]


def test_a_line_has_neither_the_query_nor_all_of_a_long_path() -> None:
    access = logging.getLogger("uvicorn.access")
    for path in ("/v1/models?api_key=secret", "/v1/models?" + "x" * 9999, "/" + "y" * 9999):
        line = access.makeRecord("uvicorn.access", 20, "", 0, '%s - "%s %s', ("a", "GET", path), None)
        assert is_news(line)
        assert line.getMessage() in ('a - "GET /v1/models', 'a - "GET /' + "y" * 199)


def test_statistics_are_logged_while_there_is_something_to_say(caplog: pytest.LogCaptureFixture) -> None:
    """The clock is the event loop's, and it is moved on by hand."""
    caplog.set_level(logging.INFO, "shoal")
    metrics = Metrics("fish")

    async def scene() -> None:
        intervals: asyncio.Queue[None] = asyncio.Queue()

        async def sleep(seconds: float) -> None:
            assert seconds == 10.0
            await intervals.get()

        with pytest.MonkeyPatch.context() as patch:
            real = asyncio.sleep
            patch.setattr(asyncio, "sleep", sleep)
            task = asyncio.create_task(log_statistics(metrics, 10.0))
            for stats in (
                None,
                SchedulerStats(3, 2, 0.5, 7, 100, 60, 10, 40, [10, 10]),
                SchedulerStats(0, 0, 0.0, 7, 100, 60, 10, 40, [10, 10]),
            ):
                await real(0)
                if stats:
                    metrics.stats("0", stats)
                intervals.put_nowait(None)
                await real(0)
                await real(0)
            task.cancel()

    asyncio.run(scene())
    assert [line.getMessage() for line in caplog.records] == [
        "running 3, waiting 2, prompt 0 tokens/s, generation 0 tokens/s, KV cache 50%, prefix cache hits 60%, "
        "drafts accepted 50%, preemptions 7"
    ]
