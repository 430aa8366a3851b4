"""Long work beside the event loop."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from pathlib import Path

import psutil
import pytest

from shoal.model.text.tokenizer import Tokenizer
from shoal.server.work import INLINE_UNITS, LONG_UNITS, UNITS_OF_EACH, off_the_loop
from tests.e2e.checkpoints import cycle_checkpoint


@pytest.mark.parametrize(
    ("sizes", "thread"),
    [
        ([INLINE_UNITS - UNITS_OF_EACH], "MainThread"),
        ([INLINE_UNITS], "asyncio_0"),
        ([0] * (INLINE_UNITS // UNITS_OF_EACH + 1), "asyncio_0"),
        ([LONG_UNITS], "shoal-long_0"),
    ],
)
def test_how_long_it_is_says_where_it_is_done(sizes: list[int], thread: str) -> None:
    assert asyncio.run(off_the_loop(lambda: threading.current_thread().name, *sizes)) == thread


def test_one_long_work_is_done_at_a_time() -> None:
    running = 0

    def work() -> int:
        nonlocal running
        running += 1
        most = running
        threading.Event().wait(0.01)
        running -= 1
        return most

    async def scene() -> list[int]:
        return await asyncio.gather(*(off_the_loop(work, LONG_UNITS) for _ in range(5)))

    assert asyncio.run(scene()) == [1] * 5


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_a_long_text_leaves_no_memory_behind(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(cycle_checkpoint(tmp_path / "cycle"))
    text, process = "0 1 " * 300_000, psutil.Process()
    before = process.memory_info().rss
    num_tokens = asyncio.run(off_the_loop(lambda: len(tokenizer.encode(text)), len(text)))
    assert num_tokens == len(text)
    assert process.memory_info().rss - before < 50 * num_tokens, "it took 200 bytes a token"
