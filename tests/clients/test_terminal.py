"""`shoal complete` and `shoal chat` in a real terminal, with a user at the keys."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.fake_server import PATIENCE, FakeServer, chat_chunks, completion_chunks

CTRL_C = "\x03"
CTRL_D = "\x04"
UP = "\x1b[A"

# A shell without a terminal starts what it runs in the background with SIGINT ignored, and so are these tests run then.
_PROGRAM = """\
import fcntl, signal, termios
from shoal.clients import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
cli.{}()
"""


class Terminal:
    """A process whose controlling terminal is a pseudo-terminal that we hold the other end of.

    Attributes:
        seen: all that the process has written.
    """

    def __init__(self, command: str, *args: str, url: str) -> None:
        self._keys, screen = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM.format(command), *args],
            stdin=screen,
            stdout=screen,
            stderr=screen,
            start_new_session=True,
            env={**os.environ, "SHOAL_URL": url, "TERM": "xterm", "NO_PROXY": "127.0.0.1"},
        )
        os.close(screen)
        self.seen = ""
        self._waited_for = 0

    def type(self, keys: str) -> None:
        os.write(self._keys, keys.encode())

    def wait_for(self, text: str) -> None:
        """Read until the text appears after the one that was waited for before."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.seen[self._waited_for :]:
            readable, _, _ = select.select([self._keys], [], [], deadline - time.monotonic())
            assert readable, f"{text!r} did not appear: {self.seen!r}"
            self.seen += self._read()
        self._waited_for = self.seen.index(text, self._waited_for) + len(text)

    def wait_asleep(self) -> None:
        """Until the process waits for something."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        while stat.read_text().rpartition(") ")[2][0] != "S":
            time.sleep(0.01)

    def exit_code(self) -> int:
        """Read until the process ends."""
        while piece := self._read():
            self.seen += piece
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._keys)

    def _read(self) -> str:
        try:
            return os.read(self._keys, 4096).decode()
        except OSError:  # Linux: the other end is closed
            return ""


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def test_ctrl_c_aborts_a_completion(server: FakeServer, terminals: list[Terminal]) -> None:
    server.stream(completion_chunks("partial")[0], done=False, ending="silence")
    terminal = Terminal("complete", "p", url=server.url)
    terminals.append(terminal)
    terminal.wait_for("partial")
    terminal.type(CTRL_C)
    assert (terminal.exit_code(), terminal.seen) == (130, "partial^C\r\nInterrupted.\r\n")
    assert server.disconnected.wait(PATIENCE)


def test_a_completion_ends_its_line(server: FakeServer, terminals: list[Terminal]) -> None:
    server.stream(*completion_chunks("no newline"))
    terminal = Terminal("complete", "p", url=server.url)
    terminals.append(terminal)
    assert terminal.exit_code() == 0
    assert terminal.seen.startswith("no newline\r\n\x1b[2m[2 tokens in ")


def test_a_conversation(server: FakeServer, terminals: list[Terminal]) -> None:
    """An answer stopped by Ctrl-C, an error, a line from the history, Ctrl-C at the prompt, and Ctrl-D."""
    server.stream(chat_chunks("a", "b")[1], done=False, ending="silence")
    server.error(500, "the engine failed")
    server.stream(*chat_chunks("Hello!"))
    terminal = Terminal("chat", "--system", "S", "--max-tokens", "64", url=server.url)
    terminals.append(terminal)

    terminal.wait_for("> ")
    terminal.type("first\r")
    terminal.wait_for("a")
    terminal.type(CTRL_C)
    assert server.disconnected.wait(PATIENCE)
    terminal.wait_for("[stopped]")
    terminal.wait_for("> ")
    terminal.type("second\r")
    terminal.wait_for("Error: the engine failed")
    terminal.wait_for("> ")
    terminal.type("not this")
    terminal.wait_for("not this")
    terminal.wait_asleep()  # CPython's readline misses a signal in the instant before it waits for the next key
    terminal.type(CTRL_C)
    terminal.wait_for("> ")
    terminal.type(UP + "\r")
    terminal.wait_for("Hello!")
    terminal.wait_for("> ")
    terminal.type(CTRL_D)

    assert terminal.exit_code() == 0
    assert "Traceback" not in terminal.seen
    remembered = ["S", "first", "a", "second"]
    assert [[m["content"] for m in seen.body["messages"]] for seen in server.requests] == [
        ["S", "first"],
        remembered,
        remembered,
    ]
