"""What the scripts of the parties have in common: where the server is, and how their checks are run."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

BASE_URL = os.environ["OPENAI_BASE_URL"]
API_KEY = os.environ["OPENAI_API_KEY"]
MODEL = os.environ["SHOAL_MODEL"]
MODEL_FOLDER = os.environ["SHOAL_MODEL_FOLDER"]  # of the checkpoint with its tokenizer, for clients that count tokens

Check = Callable[[], Coroutine[Any, Any, None] | None]
_checks: list[Check] = []


def check(function: Check) -> Check:
    """Let `run` run this function."""
    _checks.append(function)
    return function


def program(name: str, *words: str, folder: Path | None = None) -> str:
    """Run a program that the client has installed, and return what it printed.

    Args:
        name: of the program.
        words: its command line.
        folder: where it runs.

    Raises:
        AssertionError: it failed; the message is what it printed.
    """
    done = subprocess.run(
        [str(Path(sys.executable).parent / name), *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{name} exited with {done.returncode}: {done.stdout}"
    return done.stdout


def run() -> None:
    """Run each check, say how it ended, and exit with the number of those that failed."""
    num_failed = 0
    with asyncio.Runner() as runner:
        for one in _checks:
            print(f"-- {one.__name__}", flush=True)
            try:
                made = one()
                if made is not None:
                    runner.run(made)
            except Exception:
                num_failed += 1
                traceback.print_exc(file=sys.stdout)
                print(f"FAILED {one.__name__}", flush=True)
    sys.exit(num_failed)
