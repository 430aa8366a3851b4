"""What the tests of clusters leave behind."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest


@pytest.fixture(scope="module", autouse=True)
def _wait_for_orphans() -> Iterator[None]:
    """Processes of Ray lose their parents and become children of this one, which other tests would count."""
    before = psutil.Process().children()
    yield
    for process in psutil.Process().children():
        if process not in before:
            process.wait(timeout=60)
