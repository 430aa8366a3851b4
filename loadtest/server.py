"""The server under test: a real process, started as its users start it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import httpx

from shoal.loadtest.records import ServerDiedError, ServerInfo, decode

START_SECONDS = 120.0
END_SECONDS = 10.0
POLL_SECONDS = 0.05
NUM_LAST_LINES = 5
COMMAND = (sys.executable, "-m", "shoal", "serve")


class ServerProcess:
    """`shoal serve` at a free port, in a process group of its own, of which nothing is left afterwards.

    In a `with` block it is started, ready from the beginning of the block on, and ended at its end.

    Args:
        options: of `shoal serve`.
        log: file for what it prints.
        command: that starts the server.
        folder: in which it runs; None is ours.
        environment: of the process; None is ours.

    Attributes:
        process: of the API.
        port: at which it listens.
    """

    def __init__(
        self,
        options: Sequence[str],
        log: Path,
        *,
        command: Sequence[str] = COMMAND,
        port: int | None = None,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port() if port is None else port
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), *options],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        try:
            self.wait_ready()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """All that it has printed so far."""
        return self._log.read_text(errors="replace")

    def wait_ready(self, seconds: float = START_SECONDS) -> Self:
        """Wait until the server answers at `/health`.

        Raises:
            ServerDiedError: it ended, or was not ready in time; with the last lines of its log.
        """
        deadline = time.monotonic() + seconds
        while not self._is_healthy():
            self.check()
            if time.monotonic() > deadline:
                raise ServerDiedError(f"the server was not ready after {seconds:g} s; {self._last_lines()}")
            time.sleep(POLL_SECONDS)
        return self

    def check(self) -> None:
        """Raises:
        ServerDiedError: the server has ended.
        """
        code = self.process.poll()
        if code is not None:
            how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise ServerDiedError(f"the server ended {how}; {self._last_lines()}")

    def info(self) -> ServerInfo:
        """What the server says of itself.

        Raises:
            ServerDiedError: it does not say so.
        """
        try:
            answer = httpx.get(f"{self.url}/server_info", timeout=END_SECONDS, trust_env=False).raise_for_status()
        except httpx.HTTPError as error:
            self.check()
            raise ServerDiedError(f"the server does not answer GET /server_info: {error}") from error
        return decode(answer.content, ServerInfo, f"{self.url}/server_info")

    def engine_pid(self) -> int | None:
        """The engine process; None while there is none."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        with suppress(OSError):
            engines = [pid for pid in children.read_text().split() if b"engine" in _proc(pid, "cmdline").read_bytes()]
            return int(engines[0]) if engines else None
        return None

    def cpu_seconds(self) -> tuple[float, float]:
        """Processor time of the API process and of the engine so far; 0 where the system does not tell (no /proc)."""
        return self._of_both(_cpu_seconds)

    def memory(self) -> tuple[float, float]:
        """Resident MiB of the API process and of the engine; 0 where the system does not tell."""
        return self._of_both(_memory)

    def end(self) -> None:
        """End it as an operator would, and by force what does not follow."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End all of its processes by force."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _is_healthy(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/health", timeout=END_SECONDS, trust_env=False).status_code == 200
        return False

    def _of_both(self, read: Callable[[int], float]) -> tuple[float, float]:
        with suppress(OSError):
            return read(self.process.pid), read(self.engine_pid() or 0)
        return 0.0, 0.0

    def _last_lines(self) -> str:
        lines = self.log.splitlines()[-NUM_LAST_LINES:]
        return "the last lines of its log:\n" + "\n".join(lines) if lines else "its log is empty"


def free_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _proc(pid: int | str, file: str) -> Path:
    return Path(f"/proc/{pid}/{file}")


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process (proc(5): utime and stime)."""
    fields = _proc(pid, "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> float:
    """Resident MiB of a process (proc(5): VmRSS)."""
    return int(_proc(pid, "status").read_text().partition("VmRSS:")[2].split()[0]) / 1024
