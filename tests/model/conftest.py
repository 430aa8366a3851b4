"""Builders of small checkpoints and of batches, shared by the tests of this room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.model.step.batch import SamplingBatch
from tests.model import batches
from tests.model.batches import Paged


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and threads that wait for each other are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def paged() -> type[Paged]:
    return Paged


@pytest.fixture
def sampling_batch() -> Callable[..., SamplingBatch]:
    return batches.sampling_batch


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    # Transformers is slow to import, and the tests of few files need it.
    from tests.model.tiny import tiny_model  # noqa: PLC0415

    return tiny_model


@pytest.fixture
def tiny_checkpoint(tmp_path: Path, tiny_model: Callable[..., Any]) -> Callable[..., Path]:
    """Write a tiny model with `save_pretrained` and give the folder."""

    def write(architecture: str = "llama", **overrides: Any) -> Path:
        folder = tmp_path / architecture
        tiny_model(architecture, **overrides).save_pretrained(folder)
        return folder

    return write
