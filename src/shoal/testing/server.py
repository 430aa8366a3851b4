"""A real server process, started as its users start it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import httpx

from shoal.clients import ClientError, ShoalClient
from shoal.scheduler.errors import ShoalError

START_SECONDS = 120.0
END_SECONDS = 10.0
POLL_SECONDS = 0.05
NUM_LAST_LINES = 25
COMMAND = (sys.executable, "-P", "-m", "shoal", "serve")  # -P: nothing of the working directory


class ServerFailedError(ShoalError):
    """The server ended, was not ready in time, or does not answer; the message has the last lines of its log."""


class ServerProcess:
    """`shoal serve` at a free port, in a process group of its own, of which nothing is left afterwards.

    In a `with` block it is started, ready from the beginning of the block on, and ended at its end.

    Args:
        options: of `shoal serve`.
        log: file for what it prints.
        command: that starts the server.
        folder, environment: of the process; None is ours.

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
        self._closing = ExitStack()
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
            return self.wait_ready()
        except BaseException:
            self.end()
            raise

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """End it; raise ServerFailedError, with the last lines of its log, if it has not answered what was asked."""
        try:
            if isinstance(error, (ClientError, httpx.HTTPError)):
                self.check()
                raise ServerFailedError(f"the server does not answer: {error}") from error
        finally:
            self.end()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        """What OpenAI's clients take."""
        return f"{self.url}/v1"

    @cached_property
    def client(self) -> ShoalClient:
        """A client of it, closed with it."""
        return self._closing.enter_context(ShoalClient(self.url))

    @property
    def log(self) -> str:
        """All that it has printed so far."""
        return self._log.read_text(errors="replace")

    def wait_ready(self, seconds: float = START_SECONDS) -> Self:
        """Wait until the server answers at `/health`.

        Raises:
            ServerFailedError: it ended, or was not ready in time; with the last lines of its log.
        """
        deadline = time.monotonic() + seconds
        while True:
            with suppress(httpx.TransportError):
                if self.fetch("health").is_success:
                    return self
            self.check()
            if time.monotonic() > deadline:
                raise ServerFailedError(f"the server was not ready after {seconds:g} s; {last_lines(self._log)}")
            time.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Raise ServerFailedError if the server has ended."""
        code = self.process.poll()
        if code is not None:
            how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise ServerFailedError(f"the server ended {how}; {last_lines(self._log)}")

    def engine_pid(self) -> int | None:
        """The engine process; None while there is none."""
        import psutil  # noqa: PLC0415  (only those who measure have it)

        with suppress(psutil.Error):
            children = psutil.Process(self.process.pid).children()
            return next((child.pid for child in children if "engine" in " ".join(child.cmdline())), None)
        return None

    def cpu_seconds(self) -> tuple[float, float]:
        """Processor time of the API process and of the engine so far; 0 if one of them is gone."""
        return self._of_both(lambda process: sum(process.cpu_times()[:2]))

    def memory(self) -> tuple[float, float]:
        """Resident MiB of the API process and of the engine; 0 if one of them is gone."""
        return self._of_both(lambda process: process.memory_info().rss / 2**20)

    def end(self) -> None:
        """End it as an operator would, and by force what does not follow."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End all of its processes by force."""
        self._closing.close()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def fetch(self, path: str) -> httpx.Response:
        """The answer to a GET without a key."""
        # without TLS there is nothing to verify, and reading the authorities takes 50 ms
        return httpx.get(f"{self.url}/{path}", timeout=END_SECONDS, trust_env=False, verify=False)

    def _of_both(self, read: Callable[[Any], float]) -> tuple[float, float]:
        import psutil  # noqa: PLC0415

        with suppress(psutil.Error):
            return read(psutil.Process(self.process.pid)), read(psutil.Process(self.engine_pid() or 0))
        return 0.0, 0.0


def serve_options(settings: Mapping[str, Any]) -> list[str]:
    """Settings by their names, as options of `shoal serve`; those that are None are left out."""
    options = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        match value:
            case None:
                pass
            case bool():
                options.append(f"--{flag}" if value else f"--no-{flag}")
            case list() | tuple():
                options.append(f"--{flag}={json.dumps([str(item) for item in value])}")
            case _:
                options.append(f"--{flag}={value}")
    return options


def last_lines(log: Path) -> str:
    """The end of a log, for an error."""
    lines = log.read_text(errors="replace").splitlines()[-NUM_LAST_LINES:]
    return "the last lines of its log:\n" + "\n".join(lines) if lines else "its log is empty"


def free_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
