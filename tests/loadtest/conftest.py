"""The tokenizer of the bundled model, and workloads that it made."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from shoal.loadtest.workload import WorkloadRequest, make_workload
from shoal.model.text.tokenizer import Tokenizer

BUNDLED = Path(__file__).resolve().parents[2] / "model" / "bundled" / "shoal-moe"
MAX_MODEL_LEN = 1024
NUM_REQUESTS = 48
Make = Callable[[str], list[WorkloadRequest]]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUNDLED)


@pytest.fixture(scope="session")
def made(tokenizer: Tokenizer) -> Make:
    """Workloads by name, of 48 requests each; made once."""
    return cache(lambda name: make_workload(name, NUM_REQUESTS, 1, tokenizer.encode, MAX_MODEL_LEN))
