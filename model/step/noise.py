"""The noise and the chance that `sampling.py` specifies: pure functions of a seed, a position and a token id."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shoal.model.step.batch import UInt64

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MIX_MULTIPLIER_2 = 0x94D049BB133111EB
CHANCE_SEED = 0x6A09E667F3BCC909

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


def noise_keys(seeds: UInt64, positions: Int64) -> UInt64:
    """The `key` of each (seed, position)."""
    return _mix(seeds + np.uint64(GOLDEN_GAMMA) * (positions.astype(np.uint64) + np.uint64(1)))


def gumbel_noise(seed: int, position: int, vocab_size: int) -> Float64:
    """The noise `g` of token ids 0 to vocab_size - 1."""
    key = noise_keys(np.array([seed], np.uint64), np.array([position], np.int64))
    uniform = _uniform(key, np.arange(vocab_size, dtype=np.uint64))
    return -np.log(-np.log(uniform))


def chances(seeds: UInt64, positions: Int64) -> Float64:
    """The chance at each (seed, position)."""
    return _uniform(noise_keys(seeds ^ np.uint64(CHANCE_SEED), positions), np.zeros(1, np.uint64))


def _uniform(keys: UInt64, token_ids: UInt64) -> Float64:
    """The `u` of token ids under keys."""
    hashes = _mix(keys + np.uint64(GOLDEN_GAMMA) * (token_ids + np.uint64(1)))
    return ((hashes >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _mix(z: UInt64) -> UInt64:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_MULTIPLIER_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_MULTIPLIER_2)
    return z ^ (z >> np.uint64(31))
