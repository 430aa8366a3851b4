"""Options of the whole test run, and how it ends: with every process that it started."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType

import certifi
import hypothesis
import pytest

from shoal.model.backends import native_library
from shoal.model.native import build
from tests import examples

BEGAN = pytest.StashKey[float]()
PR_SET_CHILD_SUBREAPER = 36  # of Linux's <sys/prctl.h>


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sanitized", action="store_true", help="test the native libraries that `make sanitize` builds")
    parser.addoption("--seconds", type=float, help="skip the tests that would begin later than this")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGAN] = time.monotonic()
    if not config.option.markexpr:
        examples.share = 1
    # How long an example takes depends on other programs, too.  The timeout of pytest ends one that never returns.
    checks = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile(
        "tests", max_examples=examples.examples(100), deadline=None, suppress_health_check=checks
    )
    hypothesis.settings.load_profile("tests")
    if config.getoption("--sanitized"):
        native_library.library_path = partial(build.library_path, sanitize=True)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # a process that loses its parent becomes our child
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def pytest_collection_finish() -> None:
    """What lives now lives until the end: no collection of garbage need look at it again."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let clients know one public certificate authority: each of them would read 140, for longer than a test takes."""
    file = tmp_path_factory.mktemp("authorities") / "one.pem"
    first, end, _ = Path(certifi.where()).read_text("ascii").partition("-----END CERTIFICATE-----")
    file.write_text(first + end + "\n", "ascii")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(certifi, "where", lambda: str(file))
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        yield


@pytest.fixture(scope="session", autouse=True)
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where Python may not keep bytecode beside the sources, the processes of tests share it elsewhere."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if sys.dont_write_bytecode:
            monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
            monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("bytecode")))
        yield


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
