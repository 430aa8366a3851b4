"""Reads the header of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), strictly.

The format, all little-endian: the letters GGUF, a version, the numbers of tensors and of metadata keys; each key with
the type of its value and the value; each tensor's name, shape, type and offset; padding; the tensors' data.  Offsets
count from the start of the data.  Strings and arrays carry their length before them.

Everything is checked before it is used, and no length in the file decides how much is allocated.  Arrays are skipped:
only a process that needs the vocabulary spends time on its 50,000 strings.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.model.checkpoint.parts import Fields
from shoal.scheduler.errors import CheckpointError

# The types of tensors that are plain numbers; all others are blocks of quantised ones.
F32, F16, BF16 = 0, 1, 30

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
# Types of metadata values: the formats of numbers, as `struct` spells them, and the three others.
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_WIDTHS = {kind: struct.calcsize(form) for kind, form in _NUMBERS.items()} | {_BOOL: 1}
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class ArrayValue:
    """The place of a metadata array in the file.

    Attributes:
        type: GGUF's number for the type of its elements.
        start: offset in the file of the first element.
    """

    type: int
    count: int
    start: int

    def __repr__(self) -> str:
        return f"an array of {self.count} values"


Value = int | float | bool | str | ArrayValue


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as the header describes it.

    Attributes:
        shape: slowest dimension first; the file has the reverse order.
        type: GGUF's number for it; see `F32`.
        start: offset of the data in the file, a multiple of 8.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    start: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a GGUF file, and the mapped file."""

    path: Path
    data: mmap.mmap
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]

    def error(self, name: str, message: str) -> CheckpointError:
        """An error about the key or tensor of that name."""
        return CheckpointError(f"{self.path}: {name}: {message}", param=self.path.name)

    def section(self, prefix: str) -> Fields:
        """The values whose keys begin with `prefix`, by the rest of their keys."""
        values = {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}
        return Fields(self.path, values, prefix)

    def strings(self, key: str) -> list[str]:
        """The array of strings.

        Raises:
            CheckpointError: the key is missing or of another type, or a string is not UTF-8.
        """
        array = self._array(key)
        if array.type != _STRING:
            raise self.error(key, "expected an array of strings")
        data, position = self.data, array.start
        found = []
        try:
            for _ in range(array.count):
                (length,) = _LENGTH.unpack_from(data, position)
                position += 8 + length
                found.append(data[position - length : position].decode())
        except UnicodeDecodeError as error:
            raise self.error(key, f"string {len(found)} is not UTF-8") from error
        return found

    def numbers(self, key: str) -> NDArray[Any]:
        """The array of numbers, in the type that the file gives them.

        Raises:
            CheckpointError: the key is missing or of another type.
        """
        array = self._array(key)
        if array.type not in _NUMBERS:
            raise self.error(key, "expected an array of numbers")
        numbers: NDArray[Any] = np.frombuffer(self.data, _NUMBERS[array.type], array.count, array.start)
        return numbers

    def flags(self, key: str) -> list[bool]:
        """The array of flags.

        Raises:
            CheckpointError: the key is missing or of another type.
        """
        array = self._array(key)
        if array.type != _BOOL:
            raise self.error(key, "expected an array of flags")
        return [byte != 0 for byte in self.data[array.start : array.start + array.count]]

    def index(self, key: str, text: str) -> int | None:
        """The place of the string in the array of strings; None if it is not there."""
        array, data = self._array(key), self.data
        stored = _LENGTH.pack(len(text.encode())) + text.encode()
        end = min((tensor.start for tensor in self.tensors.values()), default=len(data))
        at = data.find(stored, array.start, end)
        if at < 0 or array.type != _STRING:
            return None
        position = array.start
        for index in range(array.count):  # whether it is one of the strings, and which
            if position >= at:
                return index if position == at else None
            position += 8 + int(_LENGTH.unpack_from(data, position)[0])
        return None

    def _array(self, key: str) -> ArrayValue:
        value = self.metadata.get(key)
        if not isinstance(value, ArrayValue):
            raise self.error(key, "missing" if value is None else f"expected an array, found {value!r}")
        return value


def read_gguf(path: Path) -> GgufFile:
    """Read the header and map the file.

    Raises:
        CheckpointError: naming the file, and the key or tensor if one is at fault: not readable, not GGUF, of an
            unsupported version, truncated or inconsistent.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}", param=path.name) from error
    return _Header(path, data).read()


class _Header:
    """A cursor that reads the header from its beginning to its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._position = 0
        self._subject = "the header"  # what is being read, for messages

    def read(self) -> GgufFile:
        if self._data[:4] != _MAGIC:
            raise self._error("not a GGUF file: it does not begin with the letters GGUF")
        self._skip(4)
        (version,) = self._unpack("<I")
        if version & 0xFFFF == 0:
            raise self._error("a big-endian GGUF file; only little-endian ones are supported")
        if version not in _VERSIONS:
            raise self._error(f"version {version} of GGUF is not supported; supported: 2, 3")
        num_tensors, num_keys = self._unpack("<QQ")
        metadata = self._metadata(num_keys)
        tensors = self._tensors(num_tensors, self._alignment(metadata))
        return GgufFile(self._path, self._data, metadata, tensors)

    def _metadata(self, count: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for i in range(count):
            self._subject = f"the name of metadata key {i} of {count}"
            key = self._string()
            self._subject = key
            if key in metadata:
                raise self._error("the key appears twice")
            (kind,) = self._unpack("<I")
            metadata[key] = self._value(kind)
        return metadata

    def _value(self, kind: int) -> Value:
        if kind in _NUMBERS:
            number: int | float = self._unpack(_NUMBERS[kind])[0]
            return number
        if kind == _BOOL:
            (byte,) = self._unpack("<B")
            if byte > 1:
                raise self._error(f"expected true or false, found byte {byte}")
            return bool(byte)
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        raise self._error(f"type {kind} of its value is unknown")

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        self._skip(length)
        try:
            return self._data[self._position - length : self._position].decode()
        except UnicodeDecodeError as error:
            raise self._error("not UTF-8") from error

    def _array(self) -> ArrayValue:
        kind, count = self._unpack("<IQ")
        array = ArrayValue(kind, count, self._position)
        if kind == _STRING:
            self._skip_strings(count)
        elif kind in _WIDTHS:
            self._skip(count * _WIDTHS[kind])
        else:
            raise self._error(f"an array of type {kind} is not supported")
        return array

    def _skip_strings(self, count: int) -> None:
        """A tight loop: it runs 100,000 times for an ordinary vocabulary."""
        data, position, last = self._data, self._position, self._size - 8
        for _ in range(count):
            if position > last:
                raise self._truncated()
            (length,) = _LENGTH.unpack_from(data, position)
            position += 8 + length
        self._position = position
        self._skip(0)

    def _alignment(self, metadata: Mapping[str, Value]) -> int:
        value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        self._subject = "general.alignment"
        if isinstance(value, bool) or not isinstance(value, int) or value < 8 or value & (value - 1):
            raise self._error(f"expected a power of two of at least 8, found {value!r}")
        return value

    def _tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for i in range(count):
            self._subject = f"the name of tensor {i} of {count}"
            name = self._string()
            self._subject = f"tensor {name}"
            if name in tensors:
                raise self._error("appears twice")
            tensors[name] = self._tensor(name, alignment)
        data_start = -(-self._position // alignment) * alignment
        for name, info in tensors.items():
            self._subject, start = f"tensor {name}", data_start + info.start
            if start >= self._size:
                raise self._error(f"begins at byte {start}, but the file has {self._size}")
            tensors[name] = replace(info, start=start)
        return tensors

    def _tensor(self, name: str, alignment: int) -> TensorInfo:
        """The tensor, with a `start` that counts from the beginning of the data."""
        (num_dimensions,) = self._unpack("<I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._error(f"expected 1 to {_MAX_DIMENSIONS} dimensions, found {num_dimensions}")
        shape = self._unpack(f"<{num_dimensions}Q")[::-1]
        if not all(shape):
            raise self._error(f"shape {list(shape)} is empty")
        kind, offset = self._unpack("<IQ")
        if offset % alignment:
            raise self._error(f"offset {offset} is not a multiple of the alignment {alignment}")
        return TensorInfo(name, shape, kind, offset)

    def _unpack(self, form: str) -> tuple[Any, ...]:
        start = self._position
        self._skip(struct.calcsize(form))
        return struct.unpack_from(form, self._data, start)

    def _skip(self, length: int) -> None:
        if length > self._size - self._position:
            raise self._truncated()
        self._position += length

    def _truncated(self) -> CheckpointError:
        return self._error(f"truncated, or a length in it is wrong: the file has {self._size} bytes")

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {self._subject}: {message}", param=self._path.name)
