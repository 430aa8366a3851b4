"""The tables of what depends on positions alone, shared by all backends."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shoal.model.architecture import RopeConfig, Temperature


def rope_tables(rope: RopeConfig, num_positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of every position's angles, times the attention factor, each [num_positions, dim / 2].

    Element i of the first half turns with element i of the second half.  Angles are products of float32, as in
    training: at long positions, more exact products would change the model.
    """
    frequencies = rope.theta ** -(np.arange(0, rope.dim, 2) / rope.dim)
    if rope.factors:
        frequencies = frequencies / np.array(rope.factors, np.float64)
    angles = np.outer(np.arange(num_positions, dtype=np.float32), frequencies.astype(np.float32))
    factor = np.float32(rope.attention_factor)
    return np.cos(angles) * factor, np.sin(angles) * factor


def temperature_table(temperature: Temperature, num_positions: int) -> NDArray[np.float32]:
    """The factor on the queries at every position, [num_positions]."""
    runs = np.floor((np.arange(num_positions) + temperature.offset) / temperature.length)
    return (1 + temperature.scale * np.log1p(runs)).astype(np.float32)
