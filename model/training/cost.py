"""Models on Shoal's own backends, and the time that a token takes there."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np

from shoal.model.backends.native_backend import NativeBackend
from shoal.model.backends.native_library import supported_isas
from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.record import ModelRecord
from shoal.model.step.batch import Backend, ForwardBatch, Int32

_CONTEXT = 256  # tokens before the one that is timed, at most
_BLOCK_SIZE = 16
_NUM_STEPS = 300


def decode_seconds(*folders: Path) -> list[float]:
    """Median seconds to compute one token of one sequence, for each model; the models take turns."""
    records = [load_checkpoint(folder) for folder in folders]
    context = min(_CONTEXT, *(record.config.max_position_embeddings - 1 for record in records))
    num_blocks = context // _BLOCK_SIZE + 1
    backends = [create_backend(record, num_blocks, _BLOCK_SIZE) for record in records]
    token = _one_token(context)
    seconds: list[list[float]] = [[] for _ in folders]
    for _ in range(_NUM_STEPS):
        for backend, times in zip(backends, seconds, strict=True):
            start = time.perf_counter()
            backend.forward(token)
            times.append(time.perf_counter() - start)
    return [median(times) for times in seconds]


def create_backend(record: ModelRecord, num_blocks: int, block_size: int, device: str = "cpu") -> Backend:
    """The native backend; or torch, on a GPU and where native is not built."""
    if device == "cpu" and supported_isas():
        return NativeBackend(record, num_blocks=num_blocks, block_size=block_size)
    dtype: Literal["float32", "bfloat16"] = "float32" if device == "cpu" else "bfloat16"
    return TorchBackend(record, device=device, dtype=dtype, num_blocks=num_blocks, block_size=block_size)


def _one_token(context: int) -> ForwardBatch:
    def row(*values: int) -> Int32:
        return np.array(values, np.int32)

    return ForwardBatch(
        token_ids=row(1),
        positions=row(context),
        slot_mapping=row(context)[None],
        query_start_loc=row(0, 1),
        context_lens=row(context + 1),
        block_tables=np.arange(context // _BLOCK_SIZE + 1, dtype=np.int32)[None],
        logits_indices=row(0),
    )
