"""Reads a safetensors file as numpy views of a memory map, bfloat16 included.

The format: 8 bytes little-endian length of the header, the header in JSON
{name: {"dtype", "shape", "data_offsets": [begin, end]}}, then the data that the offsets count from.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from model.record import Array
from scheduler.errors import CheckpointError

# bfloat16 is carried as its bits: see model/record.py.
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_MAX_HEADER_BYTES = 100_000_000


def read_safetensors(path: Path) -> dict[str, Array]:
    """All tensors of the file by name, read-only and loaded when touched.

    Raises:
        CheckpointError: naming the file, and the tensor where it is about one: not readable, not a safetensors file,
            truncated, or a dtype other than float32, float16 and bfloat16.
    """
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}", param=path.name) from error
    header, start = _read_header(path, data)
    return {name: _view(path, data[start:], name, entry) for name, entry in header.items() if name != "__metadata__"}


def _read_header(path: Path, data: Array) -> tuple[dict[str, Any], int]:
    """The header, and the offset at which tensor data begins."""
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or length > min(len(data) - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(f"{path}: truncated, or not a safetensors file ({len(data)} bytes)", param=path.name)
    try:
        header = json.loads(data[8 : 8 + length].tobytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: header is not valid JSON: {error}", param=path.name) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is not a JSON object", param=path.name)
    return header, 8 + length


def _view(path: Path, data: Array, name: str, entry: Any) -> Array:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name}: malformed header entry {entry!r}", param=path.name) from error
    if dtype not in _DTYPES:
        supported = ", ".join(_DTYPES)
        raise CheckpointError(
            f"{path}: tensor {name}: dtype {dtype} is not supported; supported: {supported}", param=path.name
        )
    size = math.prod(shape) * _DTYPES[dtype].itemsize
    if not 0 <= begin <= end or end - begin != size or min(shape, default=1) < 0:
        raise CheckpointError(
            f"{path}: tensor {name}: offsets {begin} to {end} do not hold {size} bytes of shape {shape}",
            param=path.name,
        )
    if end > len(data):
        raise CheckpointError(
            f"{path}: truncated: tensor {name} ends at byte {end} of the data, the file has {len(data)}",
            param=path.name,
        )
    view: Array = data[begin:end].view(_DTYPES[dtype]).reshape(shape)
    return view
