"""The server under test: a real process, started as its users start it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from shoal.loadtest.errors import ServerDiedError

START_SECONDS = 120.0
END_SECONDS = 10.0
NUM_LAST_LINES = 5
READY = re.compile(r"ready after .*: (http://\S+)")
KV_CACHE = re.compile(r"KV cache: (\d+) blocks of (\d+) tokens.*requests up to (\d+) tokens, (\d+) at once")


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """What the server says of itself when it is ready."""

    url: str
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int


class ServerProcess:
    """`shoal serve` at a free port for the length of a `with` block, which begins when the server is ready.

    It has a process group of its own, of which nothing is left afterwards.

    Args:
        options: of `shoal serve`.
        log: file for what it prints.
        command: that starts the server.

    Raises:
        ServerDiedError: on entering: it ended, or was not ready in time; with the log's last lines.
    """

    announced: Announced

    def __init__(
        self,
        options: Sequence[str],
        log: Path,
        *,
        command: Sequence[str] = (sys.executable, "-m", "shoal.server.cli", "serve"),
        start_seconds: float = START_SECONDS,
    ) -> None:
        self._command = [*command, *options, "--port", "0"]
        self._log = log
        self._start_seconds = start_seconds

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self.announced = self._wait_ready()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def url(self) -> str:
        return self.announced.url

    @property
    def pid(self) -> int:
        """Of the API process."""
        return self._process.pid

    def check(self) -> None:
        """Raises:
        ServerDiedError: the server has ended.
        """
        code = self._process.poll()
        if code is not None:
            raise ServerDiedError(f"the server ended {_describe(code)}; {self._last_lines()}")

    def cpu_seconds(self) -> tuple[float, float]:
        """Processor time of the API process and of the engine so far; 0 where the system does not tell (no /proc)."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        with suppress(OSError):
            return _cpu_seconds(self.pid), sum(_cpu_seconds(int(child)) for child in children.read_text().split())
        return 0.0, 0.0

    def end(self) -> None:
        """End it as an operator would, and whatever does not follow by force."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def _wait_ready(self) -> Announced:
        deadline = time.monotonic() + self._start_seconds
        while time.monotonic() < deadline:
            self.check()
            log = self._log.read_text(errors="replace")
            ready, cache = READY.search(log), KV_CACHE.search(log)
            if ready and cache:
                num_blocks, block_size, max_model_len, max_num_seqs = map(int, cache.groups())
                return Announced(
                    url=ready[1],
                    num_blocks=num_blocks,
                    block_size=block_size,
                    max_model_len=max_model_len,
                    max_num_seqs=max_num_seqs,
                )
            time.sleep(0.05)
        raise ServerDiedError(f"the server was not ready after {self._start_seconds:.0f} s; {self._last_lines()}")

    def _last_lines(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-NUM_LAST_LINES:]
        return "its last words:\n" + "\n".join(lines) if lines else "it said nothing"


def _describe(code: int) -> str:
    return f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process (proc(5): utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
