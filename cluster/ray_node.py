"""A Ray node of this machine for a cluster that needs no more: started if there is none, and ended with the cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from shoal.scheduler.errors import ConfigError

START_SECONDS = 180.0
STOP_SECONDS = 3.0  # the app has ended before; Ray's processes would wait for each other, 20 s in all
_NOTE = Path(tempfile.gettempdir()) / f"shoal-cluster-{os.getuid()}.json"  # of the node that was started


def start_node() -> str:
    """Start a node at a free port, and return its address once it answers.

    Raises:
        ConfigError: it ends, or does not answer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = _NOTE.with_suffix(".log")
    options = ("--head", "--block", f"--port={port}", "--disable-usage-stats", "--include-dashboard=false")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "ray"), "start", *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while b"Ray runtime started" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise ConfigError(f"ray start does not succeed: see {log}", param="address")
        time.sleep(0.1)
    address = f"127.0.0.1:{port}"
    _NOTE.write_text(json.dumps({"pid": process.pid, "address": address}), "utf-8")
    return address


def noted_address() -> str | None:
    """The address of the node that was started here, if it still runs."""
    with suppress(OSError, ValueError):
        note = json.loads(_NOTE.read_text("utf-8"))
        if _runs(note["pid"]):
            return str(note["address"])
    return None


def end_node() -> None:
    """End the node that was started here, if there is one."""
    with suppress(OSError, ValueError):
        note = json.loads(_NOTE.read_text("utf-8"))
        os.killpg(note["pid"], signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while _runs(note["pid"]) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(note["pid"], signal.SIGKILL)
    _NOTE.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    """Whether a process runs.  One that has ended is there until its status is asked for, which may be never."""
    with suppress(OSError):
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.exists() or b") Z " not in state.read_bytes()
    return False
