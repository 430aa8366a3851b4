"""The tables of rotary position embedding, shared by all backends."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from shoal.model.record import RopeConfig


def rope_tables(rope: RopeConfig, head_dim: int, num_positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of every position's angles, each [num_positions, head_dim / 2].

    Element i of a head's first half turns with element i of its second half.  Angles are products of float32, as in
    training: at long positions, more exact products would change the model.
    """
    angles = np.outer(np.arange(num_positions, dtype=np.float32), _frequencies(rope, head_dim).astype(np.float32))
    return np.cos(angles), np.sin(angles)


def _frequencies(rope: RopeConfig, head_dim: int) -> NDArray[np.float64]:
    """Radians per position of each pair, [head_dim / 2]."""
    frequencies = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if rope.scaling == "none":
        return frequencies
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "factors":
        return frequencies / np.array(rope.factors, np.float64)
    # llama3: the share of the unscaled frequency rises from 0 to 1 with the turns made within the original context.
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    share = np.clip(share, 0.0, 1.0)
    return share * frequencies + (1 - share) * frequencies / rope.factor
