from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import save_file

from shoal.model.checkpoint.gguf_file import read_gguf
from shoal.model.checkpoint.gguf_weights import read_gguf_weights
from shoal.model.checkpoint.safetensors_file import read_safetensors
from shoal.model.mapped import release
from shoal.model.numbers import Array
from tests.gguf_writer import write

SMAPS = Path("/proc/self/smaps")


def resident(path: Path) -> int:
    """KiB of the file that are in this process's memory."""
    found = re.findall(rf"^.* {re.escape(str(path))}\n(?:\w+:.*\n)*?Rss: +(\d+) kB", SMAPS.read_text(), re.MULTILINE)
    assert found, "the file is not mapped"
    return sum(map(int, found))


def from_gguf(path: Path, numbers: Array) -> Array:
    write(path, {}, {"output.weight": (numbers, Type.F32)})
    return read_gguf_weights(read_gguf(path), 1).tensors["output.weight"]


def from_safetensors(path: Path, numbers: Array) -> Array:
    save_file({"output.weight": numbers}, path)
    return read_safetensors(path)["output.weight"]


@pytest.mark.skipif(not SMAPS.exists(), reason="the kernel does not say what is resident")
@pytest.mark.parametrize("store", [from_gguf, from_safetensors])
def test_pages_are_given_back_and_read_again(store: object, tmp_path: Path) -> None:
    assert callable(store)
    numbers = np.random.default_rng(0).standard_normal((1000, 512)).astype(np.float32)
    path = tmp_path / "stored"
    array = store(path, numbers)
    np.testing.assert_array_equal(array, numbers)
    assert resident(path) >= 2000
    release(array[:500])
    assert 900 <= resident(path) <= 1100
    release(array)
    assert resident(path) <= 8
    np.testing.assert_array_equal(array, numbers)


def test_other_arrays_stay_as_they_are() -> None:
    array = np.arange(10_000)
    release(array)
    release(array[10:])
    assert array.tolist() == list(range(10_000))
