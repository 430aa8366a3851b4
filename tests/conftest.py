"""Options of the whole test run."""

from __future__ import annotations

from functools import partial

import pytest

from shoal.model.backends import native_library
from shoal.model.native import build


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sanitized", action="store_true", help="test the native libraries that `make sanitize` builds")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--sanitized"):
        native_library.library_path = partial(build.library_path, sanitize=True)
