from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType

from shoal.model.checkpoint.gguf_file import ArrayValue, TensorInfo, read_gguf
from shoal.scheduler.errors import CheckpointError

HUGE = 2**60


def header(
    *parts: bytes, num_tensors: int = 0, num_keys: int = 0, magic: bytes = b"GGUF", version: int = 3, rest: int = 64
) -> bytes:
    return magic + struct.pack("<IQQ", version, num_tensors, num_keys) + b"".join(parts) + bytes(rest)


def string(text: str | bytes, length: int | None = None) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def key(name: str, kind: int, value: bytes = b"") -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0, dims: int | None = None) -> bytes:
    num_dims = len(shape) if dims is None else dims
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", num_dims, *shape, kind, offset)


@pytest.fixture
def every_kind(tmp_path: Path) -> Path:
    """A file with a value of every type, arrays of most, and tensors of several shapes and types."""
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    for kind in (k for k in GGUFValueType if k not in (GGUFValueType.STRING, GGUFValueType.ARRAY)):
        value: Any = True if kind == GGUFValueType.BOOL else 7 if "INT" in kind.name else 0.25
        writer.add_key_value(f"value.{kind.name}", value, kind)
    writer.add_int64("value.negative", -(2**62))
    writer.add_string("value.text", "größer 数 👍")
    writer.add_string("value.empty", "")
    writer.add_array("array.texts", ["a", "", "ü▁", "👍"])
    writer.add_array("array.integers", [3, -1, 2**31 - 1])
    writer.add_array("array.floats", [0.5, -1.25])
    writer.add_array("array.flags", [True, False])
    rng = np.random.default_rng(0)
    writer.add_tensor("one", rng.standard_normal(5).astype(np.float32))
    writer.add_tensor("two", rng.standard_normal((3, 64)).astype(np.float16))
    writer.add_tensor("three", gguf.quantize(rng.standard_normal((2, 3, 64)), Type.Q8_0), raw_dtype=Type.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "all.gguf"


def test_reads_what_the_reference_reader_reads(every_kind: Path) -> None:
    ours, theirs = read_gguf(every_kind), gguf.GGUFReader(every_kind)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for name, field in fields.items():
        value = ours.metadata[name]
        if not isinstance(value, ArrayValue):
            assert value == field.contents() and type(value) is type(field.contents())
        elif field.types[-1] == GGUFValueType.STRING:
            assert ours.strings(name) == field.contents()
        elif field.types[-1] != GGUFValueType.BOOL:
            assert ours.numbers(name).tolist() == field.contents()
    assert ours.metadata["array.flags"].count == 2  # type: ignore[union-attr]
    for expected in theirs.tensors:
        shape = tuple(int(n) for n in reversed(expected.shape))
        assert ours.tensors[expected.name] == TensorInfo(
            expected.name, shape, expected.tensor_type, expected.data_offset
        )
    assert list(ours.tensors) == [t.name for t in theirs.tensors]


def test_a_section_names_its_keys_whole(every_kind: Path) -> None:
    section = read_gguf(every_kind).section("value.")
    assert section.integer("UINT16", minimum=0) == 7
    with pytest.raises(CheckpointError, match=r"all\.gguf: value\.text: expected an integer of at least 0, found 'grö"):
        section.integer("text", minimum=0)
    with pytest.raises(CheckpointError, match=r"array\.texts: expected true or false, found an array of 4 values"):
        read_gguf(every_kind).section("array.").flag("texts", default=True)


def test_arrays_of_the_wrong_kind_are_named(every_kind: Path) -> None:
    file = read_gguf(every_kind)
    for read, name, message in [
        (file.strings, "array.integers", "expected an array of strings"),
        (file.numbers, "array.texts", "expected an array of numbers"),
        (file.numbers, "array.flags", "expected an array of numbers"),
        (file.flags, "array.integers", "expected an array of flags"),
        (file.strings, "value.text", "expected an array, found 'grö"),
        (file.strings, "absent", "missing"),
    ]:
        with pytest.raises(CheckpointError, match=rf"all\.gguf: {name}: {message}"):
            read(name)


def test_a_truncated_header_is_refused(every_kind: Path, tmp_path: Path) -> None:
    whole = every_kind.read_bytes()
    first = min(info.start for info in read_gguf(every_kind).tensors.values())
    short = tmp_path / "short.gguf"
    for length in range(0, first, 5):
        short.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"short\.gguf"):
            read_gguf(short)


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read"),
    "magic": (header(magic=b"GGUG"), "not a GGUF file"),
    "version 1": (header(version=1), "version 1 of GGUF is not supported; supported: 2, 3"),
    "version 4": (header(version=4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a big-endian GGUF file"),
    "tensors": (header(num_tensors=HUGE, rest=4), f"the name of tensor 0 of {HUGE}: truncated"),
    "keys": (header(num_keys=HUGE, rest=4), f"the name of metadata key 0 of {HUGE}: truncated"),
    "long name": (header(string("abc", HUGE), num_keys=1), "the name of metadata key 0 of 1: truncated"),
    "name": (header(string(b"\xff"), num_keys=1), "the name of metadata key 0 of 1: not UTF-8"),
    "type": (header(key("a", 13), num_keys=1), "a: type 13 of its value is unknown"),
    "flag": (header(key("a", 7, b"\x02"), num_keys=1), "a: expected true or false, found byte 2"),
    "text": (header(key("a", 8, string(b"\xc3")), num_keys=1), "a: not UTF-8"),
    "long text": (header(key("a", 8, string("x", 2**64 - 1)), num_keys=1), "a: truncated"),
    "twice": (header(key("a", 0, b"1"), key("a", 0, b"1"), num_keys=2), "a: the key appears twice"),
    "numbers": (header(key("a", 9, struct.pack("<IQ", 12, HUGE)), num_keys=1), "a: truncated"),
    "strings": (header(key("a", 9, struct.pack("<IQ", 8, HUGE)), num_keys=1), "a: truncated"),
    "long string": (header(key("a", 9, struct.pack("<IQ", 8, 2) + string("x", HUGE)), num_keys=1), "a: truncated"),
    "arrays": (header(key("a", 9, struct.pack("<IQ", 9, 1)), num_keys=1), "a: an array of type 9 is not supported"),
    "alignment 0": (header(key("general.alignment", 4, bytes(4)), num_keys=1), "general.alignment: expected a power"),
    "alignment 24": (header(key("general.alignment", 0, b"\x18"), num_keys=1), "expected a power of two .*, found 24"),
    "alignment true": (header(key("general.alignment", 7, b"\x01"), num_keys=1), "found True"),
    "tensor twice": (header(tensor("t"), tensor("t"), num_tensors=2), "tensor t: appears twice"),
    "no dimensions": (header(tensor("t", ()), num_tensors=1), "tensor t: expected 1 to 4 dimensions, found 0"),
    "dimensions": (header(tensor("t", (1,), dims=2**31), num_tensors=1), "tensor t: expected 1 to 4 dimensions"),
    "no elements": (header(tensor("t", (4, 0)), num_tensors=1), r"tensor t: shape \[0, 4\] is empty"),
    "offset": (header(tensor("t", offset=8), num_tensors=1), "tensor t: offset 8 is not a multiple of the alignment"),
    "far": (header(tensor("t", offset=HUGE), num_tensors=1), "tensor t: begins at byte"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_at_once(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=rf"bad\.gguf: .*{message}"):
        read_gguf(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000, "a length in the file was believed"


def test_strings_that_are_not_utf8_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    texts = struct.pack("<IQ", 8, 2) + string("a") + string(b"\xff")
    path.write_bytes(header(key("tokens", 9, texts), num_keys=1))
    with pytest.raises(CheckpointError, match=r"bad\.gguf: tokens: string 1 is not UTF-8"):
        read_gguf(path).strings("tokens")


def test_version_2_and_another_alignment(tmp_path: Path) -> None:
    path = tmp_path / "old.gguf"
    parts = key("general.alignment", 4, struct.pack("<I", 64)), tensor("t", (2, 3), offset=64)
    path.write_bytes(header(*parts, num_keys=1, num_tensors=1, version=2, rest=400))
    info = read_gguf(path).tensors["t"]
    assert (info.shape, info.start) == ((3, 2), 192)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.gguf: cannot be read: .*No such file"):
        read_gguf(tmp_path / "none.gguf")
