"""The tensors of a checkpoint, taken one by one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal.model.checkpoint.families import Tensors
from shoal.model.checkpoint.parts import Weights, zeros
from shoal.model.numbers import Array, shape_of
from shoal.scheduler.errors import CheckpointError


class FileTensors:
    """The tensors of a checkpoint, taken one by one with the shape that the config implies."""

    def __init__(self, weights: Weights, tensors: Tensors) -> None:
        self._path = weights.path
        self._own_name = weights.own_name
        self._left = dict(weights.tensors)
        self._ignored = re.compile(tensors.ignored) if tensors.ignored else None
        bare = not any(name.startswith(tensors.prefix) for name in self._left)
        self._prefix = tensors.prefix if bare else ""

    def find(self, prefix: str, names: Sequence[str], suffix: str, *numbers: int) -> str:
        """The first of the names that the file has, with the numbers in their places; else the first one."""
        whole = [f"{prefix}{name.format(*numbers)}{suffix}" for name in names]
        return next((name for name in whole if name in self), whole[0])

    def __contains__(self, name: str) -> bool:
        return self._name(name) in self._left

    def take(self, name: str, *shape: int | None) -> Array:
        """The tensor; a size of None may be any.

        Raises:
            CheckpointError: there is none, or it has another shape.
        """
        name = self._name(name)
        sizes = ["any" if size is None else size for size in shape]
        if name not in self._left:
            raise self._error(name, f"missing; expected shape [{', '.join(map(str, sizes))}]")
        array = self._left.pop(name)
        found = shape_of(array)
        if len(found) != len(shape) or any(size not in (None, own) for size, own in zip(shape, found, strict=True)):
            raise self._error(name, f"expected shape [{', '.join(map(str, sizes))}], found {list(found)}")
        return array

    def take_flat(self, name: str, count: int) -> Array:
        """A vector, which some files hold as a matrix of one row."""
        return self.take(name, 1, count)[0] if self._ndim(name) == 2 else self.take(name, count)

    def take_heads(self, names: Sequence[str], width: int) -> Array:
        """The elements for all heads, [heads * width], of a tensor [width] for each head.

        Where all names are one, that is a tensor [heads, width], or [width] for every head.
        """
        if len(set(names)) == len(names) > 1:
            return np.concatenate([self.take(name, width) for name in names])
        if self._ndim(names[0]) == 2:
            return self.take(names[0], len(names), width).reshape(-1)
        return np.tile(self.take(names[0], width), len(names))

    def take_equal(self, name: str, other: Array) -> None:
        """Take a tensor that must be equal to `other`."""
        if not np.array_equal(self.take(name, *shape_of(other)), other):
            raise self._error(name, "differs from the embedding although config.json ties them")

    def check_all_taken(self, left_out: tuple[str, ...] = ()) -> None:
        """Refuse what is left, but for buffers and for names that begin with one of `left_out`."""
        left = (name for name in self._left if not name.startswith(left_out))
        extra = sorted(name for name in left if not (self._ignored and self._ignored.search(name)))
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise self._error(extra[0], f"unknown to the architecture{more}")

    def _ndim(self, name: str) -> int:
        return self._left[self._name(name)].ndim if name in self else 0

    def _name(self, name: str) -> str:
        """The file's name: of another format, or without the prefix."""
        return self._own_name(name.removeprefix(self._prefix))

    def _error(self, name: str, message: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: tensor {name}: {message}", param=self._path.name)


class ImpliedTensors(FileTensors):
    """The tensors that a configuration implies, where there is no file: zeros, which take no memory."""

    def __init__(self, path: Path, tensors: Tensors, dtype: np.dtype[Any]) -> None:
        super().__init__(Weights(path, {}, own_name=str), tensors)
        self._dtype = dtype

    def __contains__(self, name: str) -> bool:
        return True

    def take(self, name: str, *shape: int | None) -> Array:
        return zeros(tuple(1 if size is None else size for size in shape), self._dtype)

    def take_equal(self, name: str, other: Array) -> None:
        pass

    def _ndim(self, name: str) -> int:
        return 1
