"""How long a server takes from its command to the first token of an answer, and what its engine takes of the memory."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import httpx

from shoal.terminal import show
from shoal.testing import ServerProcess

POLL_SECONDS = 0.01
PROMPT = "def add(a, b):"
# An installed package is compiled; so is this one, by the first start.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def run(checkpoint: Path, *, repeats: int, **_: object) -> dict[str, object]:
    """Start servers one after the other; print medians."""
    _start(checkpoint)  # compiles the modules, and brings the files into memory
    measured = [_start(checkpoint) for _ in range(repeats)]
    figures = {name: median(one[name] for one in measured) for name in measured[0]}
    show(f"start: from the command to a first token, median of {repeats}", [{"model": checkpoint.name, **figures}])
    return {"start": figures}


def _start(checkpoint: Path) -> dict[str, float]:
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        options = ["--model", str(checkpoint), "--no-access-log"]
        server = ServerProcess(options, Path(folder) / "log", environment=ENVIRONMENT)
        try:
            first_token = _first_token(server) - began
            engine = server.engine_pid()
            assert engine is not None
            resident, peak = _memory(engine)
        finally:
            server.end()
    return {"first_token_seconds": first_token, "resident_mib": resident, "peak_mib": peak}


def _first_token(server: ServerProcess) -> float:
    """Ask until there is an answer; return when its first token came."""
    body = {"prompt": PROMPT, "max_tokens": 1, "stream": True}
    with httpx.Client(base_url=server.url, trust_env=False, timeout=None) as client:
        while True:
            with suppress(httpx.TransportError), client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.is_success:
                    next(answer.iter_lines())
                    return time.perf_counter()
            server.check()
            time.sleep(POLL_SECONDS)


def _memory(pid: int) -> tuple[float, float]:
    """MiB of a process now, and the most that it had, as Linux counts them."""
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE)}
    return kib["VmRSS"] / 1024, kib["VmHWM"] / 1024
