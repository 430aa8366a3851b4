"""The tensors of a GGUF file of architecture llama, dequantised, with rows in the order of `model/record.py`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from numpy.typing import NDArray

from shoal.model.checkpoint.gguf_file import BF16, F16, F32, GgufFile, TensorInfo
from shoal.model.checkpoint.parts import Weights
from shoal.scheduler.errors import CheckpointError

Array = NDArray[Any]

_PLAIN: dict[int, np.dtype[Any]] = {F32: np.dtype("<f4"), F16: np.dtype("<f2"), BF16: np.dtype("<u2")}
_NAMES = {kind.value: kind.name for kind in GGMLQuantizationType}
_SUPPORTED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
# Buffers that the metadata determines, or that are part of the config.
_NOT_WEIGHTS = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
_STACKED = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))_exps\.weight")
_ROTATED = re.compile(r"blk\.\d+\.attn_([qk])\.weight")
# Numbers that one call dequantises: 1 MB of float32, so that its intermediate arrays stay in the cache.
_NUMBERS_AT_ONCE = 2**18

_HUGGING_FACE_NAME = re.compile(r"(?:model\.layers\.(\d+)\.)?(?:block_sparse_moe\.experts\.(\d+)\.)?(.+)\.weight")
_OWN_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "w1": "ffn_gate",
    "w3": "ffn_up",
    "w2": "ffn_down",
}


def own_name(name: str) -> str:
    """llama.cpp's name for the tensor with a Hugging Face name; `name` itself where it has none.

    Experts are named one by one, `blk.0.ffn_gate.7.weight`, as in older files, which do not stack them.
    """
    match = _HUGGING_FACE_NAME.fullmatch(name)
    if match is None:
        return name
    layer, expert, part = match.groups()
    prefix = "" if layer is None else f"blk.{layer}."
    suffix = ".weight" if expert is None else f".{expert}.weight"
    return prefix + _OWN_NAMES.get(part, part) + suffix


def read_gguf_weights(file: GgufFile, *, num_heads: int, num_kv_heads: int, num_experts: int) -> Weights:
    """All weights: quantised tensors as float32, others in their own format.

    If any tensor is quantised, the others are copied, so that the file's pages can be released; else arrays are
    read-only views of the file.

    Raises:
        CheckpointError: naming the tensor: of an unsupported type, of a shape that does not fit its type or the
            numbers of heads and experts, truncated, or overlapping another one.
    """
    stored = stored_tensors(file)
    heads = {"q": num_heads, "k": num_kv_heads}
    for tensor in stored:
        if rotated := _ROTATED.fullmatch(tensor.info.name):
            tensor.rows = _by_halves(file, tensor, heads[rotated[1]])
    tensors: dict[str, Array] = {}
    for name, array in _arrays(stored).items():
        tensors |= _one_by_one(file, name, array, num_experts)
    return Weights(file.path, tensors, own_name)


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
    if name not in _SUPPORTED:
        raise _error(file, info, f"type {name} is not supported; supported: {', '.join(_SUPPORTED)}")
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


def _check_apart(file: GgufFile, stored: list[StoredTensor]) -> None:
    for one, other in pairwise(sorted(stored, key=lambda tensor: tensor.info.start)):
        if one.info.start + one.rows.size > other.info.start:
            raise _error(file, other.info, f"its data overlaps that of {one.info.name}")


def _by_halves(file: GgufFile, tensor: StoredTensor, num_heads: int) -> Array:
    """The rows of a query or key projection in the record's order: llama.cpp turns rows 2 i and 2 i + 1 of a head
    together, the record rows i and i + head_dim / 2."""
    num_rows, row_bytes = tensor.rows.shape
    if num_rows % (2 * num_heads):
        raise _error(file, tensor.info, f"{num_rows} rows are not pairs of rows for each of {num_heads} heads")
    pairs = tensor.rows.reshape(num_heads, -1, 2, row_bytes)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(num_rows, row_bytes)


def _arrays(stored: list[StoredTensor]) -> dict[str, Array]:
    """The tensors as arrays of numbers."""
    quantised = [tensor for tensor in stored if tensor.info.type not in _PLAIN]
    arrays = _dequantised(quantised) if quantised else {}
    for tensor in stored:
        if tensor.info.type in _PLAIN:
            view = tensor.rows.view(_PLAIN[tensor.info.type]).reshape(tensor.info.shape)
            arrays[tensor.info.name] = view.copy() if quantised else view
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


def _one_by_one(file: GgufFile, name: str, array: Array, num_experts: int) -> dict[str, Array]:
    """The tensor by name, or the experts that are stacked in it, each by its own name."""
    stacked = _STACKED.fullmatch(name)
    if stacked is None:
        return {name: array}
    if array.ndim != 3 or len(array) != num_experts:
        message = f"expected a matrix for each of {num_experts} experts, found shape {list(array.shape)}"
        raise file.error(f"tensor {name}", message)
    return {f"{stacked[1]}.{expert}.weight": matrix for expert, matrix in enumerate(array)}


def _error(file: GgufFile, info: TensorInfo, message: str) -> CheckpointError:
    return file.error(f"tensor {info.name}", message)
