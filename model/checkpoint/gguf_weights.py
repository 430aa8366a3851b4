"""The tensors of a GGUF file.

The library that dequantises is loaded for formats alone that are not kept: it takes longer than a small model.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shoal.model.checkpoint.gguf_file import BF16, F16, F32, GgufFile, TensorInfo
from shoal.model.checkpoint.parts import Weights, zeros
from shoal.model.numbers import BLOCKS, block_dtype, has_blocks, in_float32
from shoal.scheduler.errors import CheckpointError

Array = NDArray[Any]

_PLAIN: dict[int, np.dtype[Any]] = {F32: np.dtype("<f4"), F16: np.dtype("<f2"), BF16: np.dtype("<u2")}
# Buffers that the metadata determines, or that are part of the config.
_NOT_WEIGHTS = re.compile(r"rope_(?:freqs|factors_long|factors_short)\.weight|blk\.\d+\.attn_rot_embd\.weight")
_OF_LAYER = re.compile(r"blk\.(\d+)\.")
# GGUF's numbers of the formats that are kept.
_KEPT = {
    **{F32: "F32", F16: "F16", BF16: "BF16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0"},
    **{12: "Q4_K", 13: "Q5_K", 14: "Q6_K"},
}
# Numbers that one call dequantises: 1 MB of float32, so that its intermediate arrays stay in the cache.
_NUMBERS_AT_ONCE = 2**18


def read_gguf_weights(file: GgufFile, num_layers: int, *, outline: bool = False) -> Weights:
    """All weights of the layers that generate: read-only views of the file; matrices in formats that are not those of
    `model/numbers.py`, and quantised vectors, as float32.

    For an outline all are zeros.

    Raises:
        CheckpointError: naming the tensor: of an unsupported type, of a shape that does not fit its type, truncated, or
            overlapping another one.
    """
    stored = [tensor for tensor in stored_tensors(file) if _layer(tensor.info.name) < num_layers]
    tensors = _outline(stored) if outline else _arrays(stored)
    for name in [name for name in tensors if name.endswith("attn_k_b.weight")]:
        _join_latent(file, tensors, name)
    for name, array in tensors.items():
        if name.endswith("ffn_gate_inp_shexp.weight") and array.ndim == 1:
            tensors[name] = array[None]
    return Weights(file.path, tensors, own_name=str)


def _layer(name: str) -> int:
    """The layer that the tensor belongs to; -1 for none."""
    match = _OF_LAYER.match(name)
    return int(match[1]) if match else -1


def _join_latent(file: GgufFile, tensors: dict[str, Array], key_name: str) -> None:
    """Make one matrix, as in older files, of what gives keys and what gives values of the latent.

    They are [heads, rank, key width] and [heads, value width, rank].
    """
    value_name = key_name.replace("attn_k_b", "attn_v_b")
    key, value = tensors.pop(key_name), tensors.pop(value_name, None)
    if value is None or key.ndim != 3 or value.ndim != 3 or (len(key), key.shape[1]) != (len(value), value.shape[2]):
        raise file.error(f"tensor {key_name}", f"expected {value_name} beside it, of the same heads and rank")
    if key.dtype != value.dtype or has_blocks(key):
        key, value = in_float32(key), in_float32(value)
    joined = np.concatenate((key.swapaxes(1, 2), value), axis=1)
    tensors[key_name.replace("attn_k_b", "attn_kv_b")] = joined.reshape(-1, joined.shape[-1])


def stored_tensors(file: GgufFile) -> list[StoredTensor]:
    """All weights as the file holds them.  Of their data nothing is read.

    Raises:
        CheckpointError: naming the tensor: of an unsupported type, of a shape that does not fit its type, truncated, or
            overlapping another one.
    """
    infos = [info for info in file.tensors.values() if not _NOT_WEIGHTS.fullmatch(info.name)]
    stored = [_stored(file, info) for info in infos]
    _check_apart(file, stored)
    return stored


class Format(NamedTuple):
    """How numbers are stored: the name of GGUF, the numbers of a block, and its bytes."""

    name: str
    numbers: int
    bytes: int


@dataclass(slots=True)
class StoredTensor:
    """A tensor as the file holds it.

    Attributes:
        rows: its bytes, uint8 [rows, bytes of a row]; a row is the tensor's last dimension.
    """

    info: TensorInfo
    format: Format
    rows: Array


def _stored(file: GgufFile, info: TensorInfo) -> StoredTensor:
    kind = find_format(info.type)
    if kind is None:
        from gguf import GGMLQuantizationType  # noqa: PLC0415

        known = {one.value: one.name for one in GGMLQuantizationType}
        supported = ", ".join(name for number, name in known.items() if find_format(number))
        name = known.get(info.type, str(info.type))
        raise _error(file, info, f"type {name} is not supported; supported: {supported}")
    row = info.shape[-1]
    if row % kind.numbers:
        raise _error(file, info, f"rows of {row} are not whole blocks of {kind.numbers}, as {kind.name} needs")
    num_rows, row_bytes = math.prod(info.shape[:-1]), row // kind.numbers * kind.bytes
    end = info.start + num_rows * row_bytes
    if end > len(file.data):
        ends = f"shape {list(info.shape)} in {kind.name} ends at byte {end}, the file has {len(file.data)}"
        raise _error(file, info, f"truncated: {ends}")
    data = np.frombuffer(file.data, np.uint8, num_rows * row_bytes, info.start)
    return StoredTensor(info, kind, data.reshape(num_rows, row_bytes))


@cache
def find_format(number: int) -> Format | None:
    """The format that is GGUF's type of this number; None if it is not kept, and the library cannot dequantise it."""
    if name := _KEPT.get(number):
        return Format(name, *(BLOCKS[name] if name in BLOCKS else (1, _PLAIN[number].itemsize)))
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: PLC0415

    try:
        kind = GGMLQuantizationType(number)
        found = Format(kind.name, *GGML_QUANT_SIZES[kind])
        _dequantise(np.zeros((1, found.bytes), np.uint8), np.zeros(found.numbers), found)
    except (ValueError, NotImplementedError):
        return None
    return found


def _check_apart(file: GgufFile, stored: list[StoredTensor]) -> None:
    for one, other in pairwise(sorted(stored, key=lambda tensor: tensor.info.start)):
        if one.info.start + one.rows.size > other.info.start:
            raise _error(file, other.info, f"its data overlaps that of {one.info.name}")


def _kept_dtype(tensor: StoredTensor) -> np.dtype[Any] | None:
    """The dtype of a tensor that the record has as the file has it; None for others."""
    if tensor.format.name in BLOCKS and len(tensor.info.shape) > 1:
        return block_dtype(tensor.format.name)
    return _PLAIN.get(tensor.info.type)


def _outline(stored: list[StoredTensor]) -> dict[str, Array]:
    arrays = {}
    for tensor in stored:
        shape, dtype = tensor.info.shape, _kept_dtype(tensor)
        if dtype is not None and dtype.names:
            shape = *shape[:-1], shape[-1] // tensor.format.numbers
        arrays[tensor.info.name] = zeros(shape, _PLAIN[F32] if dtype is None else dtype)
    return arrays


def _arrays(stored: list[StoredTensor]) -> dict[str, Array]:
    """The tensors as arrays of numbers."""
    others = [tensor for tensor in stored if _kept_dtype(tensor) is None]
    arrays = _dequantised(others) if others else {}
    for tensor in stored:
        if (dtype := _kept_dtype(tensor)) is not None:
            arrays[tensor.info.name] = tensor.rows.view(dtype).reshape(*tensor.info.shape[:-1], -1)
    return arrays


def _dequantised(tensors: list[StoredTensor]) -> dict[str, Array]:
    """Dequantise on all cores (numpy releases the GIL) into one allocation (only large ones get large pages)."""
    sizes = [math.prod(tensor.info.shape) for tensor in tensors]
    room = np.split(np.empty(sum(sizes), np.float32), np.cumsum(sizes)[:-1])
    # glibc returns a large freed array to the kernel, and new pages for the next array take longer than its arithmetic.
    # Once a larger array has been freed, glibc keeps such pages (mallopt(3), M_MMAP_THRESHOLD).
    np.empty(16 * _NUMBERS_AT_ONCE, np.float32)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = [part for pair in zip(tensors, room, strict=True) for part in _parts(*pair)]
        list(pool.map(_dequantise, *zip(*parts, strict=True)))
    return {tensor.info.name: array.reshape(tensor.info.shape) for tensor, array in zip(tensors, room, strict=True)}


def _parts(tensor: StoredTensor, array: Array) -> Iterator[tuple[Array, Array, Format]]:
    """The tensor in parts of blocks, each with its place in the array and its format."""
    blocks, numbers = tensor.rows.reshape(-1, tensor.format.bytes), array.reshape(-1, tensor.format.numbers)
    step = _NUMBERS_AT_ONCE // tensor.format.numbers
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        yield blocks[part], numbers[part], tensor.format


def _dequantise(blocks: Array, numbers: Array, kind: Format) -> None:
    from gguf import GGMLQuantizationType, quants  # noqa: PLC0415

    # As one long row: the library takes 16 rows at a time, and 16 rows of a matrix are too little work for a call.
    with np.errstate(all="ignore"):
        rows = quants.dequantize(blocks.reshape(1, -1), GGMLQuantizationType[kind.name])
        numbers[:] = rows.reshape(numbers.shape)


def _error(file: GgufFile, info: TensorInfo, message: str) -> CheckpointError:
    return file.error(f"tensor {info.name}", message)
