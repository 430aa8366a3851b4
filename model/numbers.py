"""The formats in which a record holds numbers: plain ones, and the quantised blocks of GGUF.

An array of blocks has a structured dtype whose one field, named after the format, is the bytes of a block.  Its last
dimension counts blocks, so that rows are chosen, joined and put in another order as those of any array.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# The formats that the native backend computes with as they are: the numbers of a block, and its bytes.
BLOCKS: Mapping[str, tuple[int, int]] = {
    **{"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34)},
    **{"Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)},
}


def block_dtype(name: str) -> np.dtype[Any]:
    """The dtype of arrays of such blocks."""
    return np.dtype([(name, f"V{BLOCKS[name][1]}")])


def format_name(array: Array) -> str:
    """What the format is called: numpy's name, bfloat16, or that of the blocks."""
    if array.dtype.names:
        return array.dtype.names[0]
    return "bfloat16" if array.dtype == np.uint16 else array.dtype.name


def has_blocks(array: Array) -> bool:
    """Whether it is an array of blocks."""
    return array.dtype.names is not None


def shape_of(array: Array) -> tuple[int, ...]:
    """The shape in numbers."""
    if not has_blocks(array):
        return array.shape
    return *array.shape[:-1], array.shape[-1] * BLOCKS[format_name(array)][0]


def count_numbers(array: Array) -> int:
    """How many numbers the array holds."""
    return prod(shape_of(array))


def in_float32(array: Array) -> Array:
    """The numbers in float32."""
    if has_blocks(array):
        from gguf import GGMLQuantizationType, quants  # noqa: PLC0415 (takes 0.1 s, and few need it)

        kind = GGMLQuantizationType[format_name(array)]
        with np.errstate(all="ignore"):
            rows = quants.dequantize(np.ascontiguousarray(array).view(np.uint8), kind)
        return rows.reshape(shape_of(array))
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
