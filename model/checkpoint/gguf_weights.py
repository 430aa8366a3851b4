"""The tensors of a GGUF file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from numpy.typing import NDArray

from shoal.model.checkpoint.gguf_file import BF16, F16, F32, GgufFile, TensorInfo
from shoal.model.checkpoint.parts import Weights, zeros
from shoal.model.numbers import BLOCKS, block_dtype, has_blocks, in_float32
from shoal.scheduler.errors import CheckpointError

Array = NDArray[Any]

_PLAIN: dict[int, np.dtype[Any]] = {F32: np.dtype("<f4"), F16: np.dtype("<f2"), BF16: np.dtype("<u2")}
_NAMES = {kind.value: kind.name for kind in GGMLQuantizationType}
# Buffers that the metadata determines, or that are part of the config.
_NOT_WEIGHTS = re.compile(r"rope_(?:freqs|factors_long|factors_short)\.weight|blk\.\d+\.attn_rot_embd\.weight")
_OF_LAYER = re.compile(r"blk\.(\d+)\.")
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


@dataclass(slots=True)
class StoredTensor:
    """A tensor as the file holds it.

    Attributes:
        rows: its bytes, uint8 [rows, bytes of a row]; a row is the tensor's last dimension.
    """

    info: TensorInfo
    type: GGMLQuantizationType
    rows: Array


def _stored(file: GgufFile, info: TensorInfo) -> StoredTensor:
    name = _NAMES.get(info.type, str(info.type))
    if not is_supported(info.type):
        supported = ", ".join(name for number, name in _NAMES.items() if is_supported(number))
        raise _error(file, info, f"type {name} is not supported; supported: {supported}")
    kind = GGMLQuantizationType(info.type)
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    row = info.shape[-1]
    if row % block_size:
        raise _error(file, info, f"rows of {row} are not whole blocks of {block_size}, as {name} needs")
    num_rows, row_bytes = math.prod(info.shape[:-1]), row // block_size * block_bytes
    end = info.start + num_rows * row_bytes
    if end > len(file.data):
        ends = f"shape {list(info.shape)} in {name} ends at byte {end}, the file has {len(file.data)}"
        raise _error(file, info, f"truncated: {ends}")
    data = np.frombuffer(file.data, np.uint8, num_rows * row_bytes, info.start)
    return StoredTensor(info, kind, data.reshape(num_rows, row_bytes))


@cache
def is_supported(number: int) -> bool:
    """Whether numbers of the type are plain, or the library can dequantise them."""
    if number not in _NAMES:
        return False
    kind = GGMLQuantizationType(number)
    try:
        _dequantise(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), np.zeros(GGML_QUANT_SIZES[kind][0]), kind)
    except NotImplementedError:
        return number in _PLAIN
    return True


def _check_apart(file: GgufFile, stored: list[StoredTensor]) -> None:
    for one, other in pairwise(sorted(stored, key=lambda tensor: tensor.info.start)):
        if one.info.start + one.rows.size > other.info.start:
            raise _error(file, other.info, f"its data overlaps that of {one.info.name}")


def _kept_dtype(tensor: StoredTensor) -> np.dtype[Any] | None:
    """The dtype of a tensor that the record has as the file has it; None for others."""
    if tensor.type.name in BLOCKS and len(tensor.info.shape) > 1:
        return block_dtype(tensor.type.name)
    return _PLAIN.get(tensor.info.type)


def _outline(stored: list[StoredTensor]) -> dict[str, Array]:
    arrays = {}
    for tensor in stored:
        shape, dtype = tensor.info.shape, _kept_dtype(tensor)
        if dtype is not None and dtype.names:
            shape = *shape[:-1], shape[-1] // BLOCKS[tensor.type.name][0]
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


def _parts(tensor: StoredTensor, array: Array) -> Iterator[tuple[Array, Array, GGMLQuantizationType]]:
    """The tensor in parts of blocks, each with its place in the array and its type."""
    block_size, block_bytes = GGML_QUANT_SIZES[tensor.type]
    blocks, numbers = tensor.rows.reshape(-1, block_bytes), array.reshape(-1, block_size)
    step = _NUMBERS_AT_ONCE // block_size
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        yield blocks[part], numbers[part], tensor.type


def _dequantise(blocks: Array, numbers: Array, kind: GGMLQuantizationType) -> None:
    # As one long row: the library takes 16 rows at a time, and 16 rows of a matrix are too little work for a call.
    with np.errstate(all="ignore"):
        numbers[:] = quants.dequantize(blocks.reshape(1, -1), kind).reshape(numbers.shape)


def _error(file: GgufFile, info: TensorInfo, message: str) -> CheckpointError:
    return file.error(f"tensor {info.name}", message)
