"""Options of the whole test run."""

from __future__ import annotations

import time
from functools import partial

import pytest

from shoal.model.backends import native_library
from shoal.model.native import build

BEGAN = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sanitized", action="store_true", help="test the native libraries that `make sanitize` builds")
    parser.addoption("--seconds", type=float, help="skip the tests that would begin later than this")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGAN] = time.monotonic()
    if config.getoption("--sanitized"):
        native_library.library_path = partial(build.library_path, sanitize=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    limit, began = item.config.getoption("--seconds"), item.config.stash[BEGAN]
    if limit is not None and time.monotonic() - began > limit:
        pytest.skip(f"the {limit:.0f} seconds are over")
