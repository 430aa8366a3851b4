"""Ray nodes that tests start and end: processes of this machine, the second one behind a link that can be cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

NEAR, FAR, PORT = "10.231.7.1", "10.231.7.2", 6399
NAMESPACE, LINK, FAR_LINK = "shoal-far", "shoal-near", "shoal-link"
ROOM = ("--num-cpus=1", "--memory=200000000")
PATIENCE = 120.0


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["ip", *words], capture_output=True, check=check)


def has_links() -> bool:
    """Whether this machine lets a test have a network of its own."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    try:
        Link().close()
    except subprocess.CalledProcessError:
        return False
    return True


class Link:
    """A network of two addresses: that of this machine, and that of a namespace."""

    def __init__(self) -> None:
        self.close()
        _ip("netns", "add", NAMESPACE)
        _ip("link", "add", LINK, "type", "veth", "peer", "name", FAR_LINK)
        _ip("link", "set", FAR_LINK, "netns", NAMESPACE)
        _ip("addr", "add", f"{NEAR}/24", "dev", LINK)
        _ip("netns", "exec", NAMESPACE, "ip", "addr", "add", f"{FAR}/24", "dev", FAR_LINK)
        _ip("netns", "exec", NAMESPACE, "ip", "link", "set", "lo", "up")
        _ip("netns", "exec", NAMESPACE, "ip", "link", "set", FAR_LINK, "up")
        self.mend()

    def cut(self) -> None:
        """Nothing comes through any more, and nobody is told."""
        _ip("link", "set", LINK, "down")

    def mend(self) -> None:
        _ip("link", "set", LINK, "up")

    def close(self) -> None:
        _ip("link", "del", LINK, check=False)
        _ip("netns", "del", NAMESPACE, check=False)


class Node:
    """A Ray node, which has room for one engine and one API process.

    Args:
        folder: of its log, and of what Ray writes.
    """

    def __init__(self, folder: Path, *, is_head: bool) -> None:
        self._folder = folder
        self._is_head = is_head
        self.start()

    def start(self) -> None:
        is_head, folder = self._is_head, self._folder
        where = ["--head", f"--port={PORT}", "--include-dashboard=false"] if is_head else [f"--address={NEAR}:{PORT}"]
        address = f"--node-ip-address={NEAR if is_head else FAR}"
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block", *where, address, *ROOM]
        inside: Sequence[str] = () if is_head else ("ip", "netns", "exec", NAMESPACE)
        log = folder / f"{'near' if is_head else 'far'}.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*inside, *command, "--disable-usage-stats"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "RAY_TMPDIR": str(folder)},
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE
        while b"Ray runtime started" not in log.read_bytes():
            assert self._process.poll() is None and time.monotonic() < deadline, log.read_text("utf-8")
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        own = psutil.Process(self._process.pid)
        return [own, *own.children(recursive=True)]

    def close(self) -> None:
        """End all of it at once, as a machine does that loses its power."""
        with suppress(psutil.NoSuchProcess):
            for process in self.processes():
                with suppress(psutil.NoSuchProcess):
                    os.kill(process.pid, signal.SIGKILL)
        self._process.wait()
