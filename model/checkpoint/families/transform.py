"""What loading does to tensors that a family stores otherwise than the record."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shoal.model.numbers import Array

Split = Callable[[Array, int, int, int], tuple[Array, Array, Array]]
"""Cuts a fused projection of queries, keys and values.

It takes a weight or bias, of which the first dimension is that of the projections together, and the numbers of heads,
of KV heads and of elements of a head; it gives the parts of queries, keys and values.
"""

_CODEGEN_PARTS = 4


def by_parts(fused: Array, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Array, Array, Array]:
    """All queries, then all keys, then all values (GPT-2, Phi-3, MPT)."""
    q, k, v = np.split(fused, [num_heads * head_dim, (num_heads + num_kv_heads) * head_dim])
    return q, k, v


def by_groups(fused: Array, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Array, Array, Array]:
    """For each KV head the queries of its group, its key and its value (GPT-NeoX, BLOOM, Falcon)."""
    groups = fused.reshape(num_kv_heads, num_heads // num_kv_heads + 2, head_dim, *fused.shape[1:])
    q, k, v = (part.reshape(-1, *fused.shape[1:]) for part in (groups[:, :-2], groups[:, -2], groups[:, -1]))
    return q, k, v


def by_quarters(fused: Array, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Array, Array, Array]:
    """Four times a quarter of the queries, of the values and of the keys (CodeGen)."""
    parts = fused.reshape(_CODEGEN_PARTS, 3, -1, *fused.shape[1:])
    q, v, k = (parts[:, index].reshape(-1, *fused.shape[1:]) for index in range(3))
    return q, k, v


def halves(rows: Array, num_heads: int, dim: int, *, last: bool = False) -> Array:
    """The rows of heads, of which elements 2 i and 2 i + 1 turn together, in an order in which i and i + dim / 2 do.

    It is done in place if the rows may be written: they are then part of an allocation that a copy would not free.

    Args:
        dim: elements of a head that turn: its first ones, or its last ones.
    """
    heads = rows.reshape(num_heads, -1, *rows.shape[1:])
    still = heads.shape[1] - dim
    turning, rest = (heads[:, still:], heads[:, :still]) if last else (heads[:, :dim], heads[:, dim:])
    turning = np.concatenate((turning[:, 0::2], turning[:, 1::2]), axis=1)
    turned: Array = np.concatenate((rest, turning) if last else (turning, rest), axis=1).reshape(rows.shape)
    if not rows.flags.writeable:
        return turned
    rows[:] = turned
    return rows


def sinusoids(num_positions: int, width: int) -> Array:
    """The table of positions of the original transformer as XGLM has it, sines in the first half of a row and cosines
    in the second, float32 [num_positions, width]."""
    half = width // 2
    frequencies = np.exp(np.arange(half) * (-np.log(10_000.0) / (half - 1)))
    angles = np.outer(np.arange(num_positions), frequencies)
    table = np.concatenate((np.sin(angles), np.cos(angles), np.zeros((num_positions, width % 2))), axis=1)
    return table.astype(np.float32)
