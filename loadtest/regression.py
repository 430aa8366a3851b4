"""Least squares for costs: never negative, relative, and not misled by outliers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_NUM_ROUNDS = 20
_HUBER = 1.345  # standard deviations: 95% as efficient as least squares on normal errors (Huber 1964)
_TO_DEVIATIONS = 1.4826  # from the median absolute deviation of a normal distribution
_TINY = 1e-12


def fit_robustly(table: Array, target: Array) -> Array:
    """Coefficients, none negative, of the columns of `table` whose sum is next to `target`.

    Errors count relative to the prediction, and by the loss of Huber 1964 ("Robust Estimation of a Location
    Parameter"), through iteratively reweighted least squares.
    """
    target = np.maximum(target, _TINY)
    scale = np.maximum(np.abs(table).max(axis=0), _TINY)
    weights = 1 / target
    found: Array = np.zeros(table.shape[1])
    for _ in range(_NUM_ROUNDS):
        before, found = found, nnls(table / scale * weights[:, None], target * weights)
        if np.allclose(before, found, rtol=1e-6, atol=0):
            break
        predicted = np.maximum(table / scale @ found, _TINY)
        errors = np.abs(target / predicted - 1)
        limit = _HUBER * _TO_DEVIATIONS * max(float(np.median(errors)), 1e-6)
        weights = np.sqrt(np.minimum(1, limit / np.maximum(errors, _TINY))) / predicted
    return np.asarray(found / scale)


def nnls(table: Array, target: Array) -> Array:
    """The x >= 0 that minimizes |table x - target|, by Lawson and Hanson 1974, "Solving Least Squares Problems"."""
    orthogonal, triangle = np.linalg.qr(table)  # as many rows as columns are enough from here on
    target = orthogonal.T @ target
    num_columns = table.shape[1]
    found = np.zeros(num_columns)
    is_free = np.zeros(num_columns, dtype=bool)
    tolerance = 1e-10 * float(np.abs(triangle).max(initial=0)) * float(np.abs(target).max(initial=0))
    for _ in range(10 * num_columns):
        gradient = triangle.T @ (target - triangle @ found)
        gradient[is_free] = -np.inf
        if gradient.max() <= tolerance:
            break
        is_free[gradient.argmax()] = True
        found = _settle(triangle, target, found, is_free)
    return found


def _settle(table: Array, target: Array, found: Array, is_free: NDArray[np.bool_]) -> Array:
    """Solve for the free columns; those that would become negative are bound to 0 again, first come first."""
    while is_free.any():
        wanted = np.zeros_like(found)
        wanted[is_free] = np.linalg.lstsq(table[:, is_free], target)[0]
        falls = is_free & (wanted <= 0)
        if not falls.any():
            return wanted
        steps = found[falls] / np.maximum(found[falls] - wanted[falls], _TINY)
        found = np.maximum(found + steps.min() * (wanted - found), 0)
        is_free &= ~(falls & (found <= _TINY * found.max(initial=1)))
        found[~is_free] = 0
    return np.zeros_like(found)
