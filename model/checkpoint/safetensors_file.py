"""Reads a safetensors file as numpy views of a memory map, bfloat16 included.

The format: 8 bytes little-endian length of the header, the header in JSON
{name: {"dtype", "shape", "data_offsets": [begin, end]}}, then the data; offsets count from its start.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.scheduler.errors import CheckpointError

Array = NDArray[Any]

# bfloat16 is carried as its bits: see model/record.py.
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_MAX_HEADER_BYTES = 100_000_000


def read_safetensors(path: Path) -> dict[str, Array]:
    """All tensors of the file by name: read-only views, loaded on access; misaligned tensors are copied.

    Raises:
        CheckpointError: naming the file, and the tensor if one is at fault: not readable, not a safetensors file,
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
        header = json.loads(data[8 : 8 + length].tobytes(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not valid JSON: {error}", param=path.name) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is not a JSON object", param=path.name)
    return header, 8 + length


def _view(path: Path, data: Array, name: str, entry: Any) -> Array:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise _error(path, name, f"malformed header entry {entry!r}")
    if dtype not in _DTYPES:
        raise _error(path, name, f"dtype {dtype} is not supported; supported: {', '.join(_DTYPES)}")
    if not all(isinstance(length, int) and length > 0 for length in shape):
        raise _error(path, name, f"shape {shape} is not one of positive integers")
    size = math.prod(shape) * _DTYPES[dtype].itemsize
    if not 0 <= begin <= end or end - begin != size:
        raise _error(path, name, f"offsets {begin} to {end} do not hold {size} bytes of shape {shape}")
    if end > len(data):
        raise _error(path, name, f"truncated: it ends at byte {end} of the data, the file has {len(data)}")
    view: Array = data[begin:end].view(_DTYPES[dtype]).reshape(shape)
    return np.require(view, requirements=["ALIGNED"])


def _error(path: Path, name: str, message: str) -> CheckpointError:
    return CheckpointError(f"{path}: tensor {name}: {message}", param=path.name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these members; json itself would keep the last of those that share a name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name appears twice")
    return found
