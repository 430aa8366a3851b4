"""Options of the whole test run, and how it ends: with every process that it started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import FrameType

import hypothesis
import pytest

from shoal.model.backends import native_library
from shoal.model.native import build

BEGAN = pytest.StashKey[float]()
PR_SET_CHILD_SUBREAPER = 36  # of Linux's <sys/prctl.h>

# How long an example takes depends on other programs, too.  The timeout of pytest ends one that never returns.
hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sanitized", action="store_true", help="test the native libraries that `make sanitize` builds")
    parser.addoption("--seconds", type=float, help="skip the tests that would begin later than this")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGAN] = time.monotonic()
    if config.getoption("--sanitized"):
        native_library.library_path = partial(build.library_path, sanitize=True)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # a process that loses its parent becomes our child
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    limit, began = item.config.getoption("--seconds"), item.config.stash[BEGAN]
    if limit is not None and time.monotonic() - began > limit:
        pytest.skip(f"the {limit:.0f} seconds are over")


def pytest_unconfigure() -> None:
    _end_processes()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End the run.  Its processes go first, so that no teardown waits for one of them to end by itself."""
    _end_processes()
    raise KeyboardInterrupt


def _end_processes() -> None:
    """Kill all processes that were started by this one, or by one of them."""
    while children := [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]:
        for pid in map(int, children):
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # another thread has waited for it
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
