"""`python -m tests.hostile.watched FILE serve ...`: the `shoal` command, with the stalls of its event loop in a file.

A task wakes every millisecond.  Where it is late, the file gets a line with the wall time and the loop's own processor
time in ms, and where the loop was after 25 ms.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from pathlib import Path

from shoal.cli import main
from shoal.server import serve

LATE = 0.025
_serve = serve.serve


class Watch:
    """Watches the loop that it is made in."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1, encoding="utf-8")
        self._thread_id = threading.get_ident()
        self._woken = time.monotonic()
        self._seen = ""
        threading.Thread(target=self._look, daemon=True).start()

    async def run(self) -> None:
        while True:
            used = time.thread_time()
            await asyncio.sleep(0.001)
            wall, used = time.monotonic() - self._woken, time.thread_time() - used
            if wall > LATE:
                self._file.write(f"{1000 * wall:.0f} {1000 * used:.0f} {self._seen}\n")
            self._woken, self._seen = time.monotonic(), ""

    def _look(self) -> None:
        while True:
            time.sleep(0.005)
            if not self._seen and time.monotonic() - self._woken > LATE:
                stack = traceback.extract_stack(sys._current_frames()[self._thread_id])[-14:]
                self._seen = " < ".join(f"{Path(one.filename).name}:{one.lineno} {one.name}" for one in stack[::-1])


async def watched(settings: object) -> None:
    watching = asyncio.create_task(Watch(Path(sys.argv[1])).run())
    try:
        await _serve(settings)  # type: ignore[arg-type]
    finally:
        watching.cancel()


if __name__ == "__main__":
    serve.serve = watched  # type: ignore[assignment]
    main(sys.argv[2:])
