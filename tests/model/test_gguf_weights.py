from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Type

from shoal.model.checkpoint.gguf_file import read_gguf
from shoal.model.checkpoint.gguf_weights import read_gguf_weights
from shoal.model.numbers import BLOCKS, in_float32, shape_of
from shoal.scheduler.errors import CheckpointError
from tests.gguf_writer import write

PLAIN = {Type.F32: np.float32, Type.F16: np.float16, Type.BF16: np.uint16}
# All that the library dequantises.
QUANTISED = [kind for kind in Type if kind in quants._type_traits and kind not in PLAIN]
# Where blocks have scales in float16, which are to be finite (those of IQ1_M lie scattered); all other bytes may be
# anything.
_TWO = (Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q5_K)
SCALES = {kind: [0, 2] for kind in _TWO} | {Type.MXFP4: [], Type.NVFP4: [], Type.IQ1_M: []}
SCALES |= {Type.Q6_K: [208], Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.TQ1_0: [52], Type.TQ2_0: [64]}


def load(path: Path, num_layers: int = 4) -> dict[str, Any]:
    return dict(read_gguf_weights(read_gguf(path), num_layers).tensors)


def blocks(kind: Type, shape: tuple[int, ...], seed: int = 0) -> Any:
    """Bytes of random blocks."""
    size, width = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // size, width), np.uint8)
    for offset in SCALES.get(kind, [0]):
        data[..., offset + 1] &= 0b1011_1011  # an exponent below the one of infinity
    return data.reshape(*shape[:-1], -1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of scales that are not finite
@pytest.mark.parametrize("kind", QUANTISED)
def test_blocks_become_the_numbers_of_the_library(kind: Type, tmp_path: Path) -> None:
    """In matrices of several parts, of less than one, and in a stack of experts."""
    shapes = {"output.weight": (700, 1024), "token_embd.weight": (3, 256), "blk.0.ffn_up_exps.weight": (2, 40, 512)}
    stored = {name: blocks(kind, shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    path = write(tmp_path / "a.gguf", {}, {name: (data, kind) for name, data in stored.items()})
    tensors = load(path)
    expected = {name: gguf.dequantize(data, kind) for name, data in stored.items()}
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert shape_of(tensors[name]) == array.shape and tensors[name].flags.c_contiguous
        np.testing.assert_array_equal(in_float32(tensors[name]), array)
        if kind.name in BLOCKS:
            assert tensors[name].tobytes() == stored[name].tobytes()
        else:
            assert tensors[name].dtype == np.float32


@pytest.mark.parametrize(("kind", "steps"), [(Type.Q8_0, 254), (Type.Q4_0, 16), (Type.Q4_1, 15), (Type.Q5_1, 31)])
def test_quantised_numbers_come_back_within_a_step(kind: Type, steps: int, tmp_path: Path) -> None:
    numbers = np.random.default_rng(1).uniform(-1, 1, (64, 96)).astype(np.float32)
    path = write(tmp_path / "a.gguf", {}, {"output.weight": (gguf.quantize(numbers, kind), kind)})
    error = np.abs(in_float32(load(path)["output.weight"]) - numbers)
    assert 0 < error.max() <= 2.02 / steps


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_numbers_are_views_of_the_file(kind: Type, tmp_path: Path) -> None:
    numbers = np.random.default_rng(2).standard_normal((4, 6)).astype(np.float32)
    stored = gguf.quantize(numbers, kind)
    path = write(tmp_path / "a.gguf", {}, {"output.weight": (stored, kind)})
    array = load(path)["output.weight"]
    assert array.dtype == PLAIN[kind]
    assert array.tobytes() == stored.tobytes()
    assert not array.flags.owndata and not array.flags.writeable


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_have_the_sizes_of_the_library(name: str) -> None:
    assert BLOCKS[name] == GGML_QUANT_SIZES[Type[name]]


def test_quantised_vectors_become_float32(tmp_path: Path) -> None:
    numbers = np.ones(64, np.float32)
    path = write(tmp_path / "a.gguf", {}, {"a.weight": (gguf.quantize(numbers, Type.Q8_0), Type.Q8_0)})
    array = load(path)["a.weight"]
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, numbers, rtol=1e-3)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    numbers = np.ones((4, 32), np.float32)
    names = ("blk.0.attn_q.weight", "blk.2.attn_q.weight", "blk.2.nextn.eh_proj.weight", "output.weight")
    path = write(tmp_path / "a.gguf", {}, dict.fromkeys(names, (numbers, Type.F32)))
    assert load(path, num_layers=2).keys() == {"blk.0.attn_q.weight", "output.weight"}


@pytest.mark.parametrize("kinds", [(Type.F32, Type.F32), (Type.F16, Type.F16), (Type.Q8_0, Type.F32)])
def test_keys_and_values_of_the_latent_are_one_matrix(kinds: tuple[Type, Type], tmp_path: Path) -> None:
    """Two heads, a rank of 32, keys of 64 elements and values of 5."""
    rng = np.random.default_rng(0)
    key, value = (rng.integers(-4, 4, shape).astype(np.float32) for shape in ((2, 32, 64), (2, 5, 32)))
    parts = {"blk.1.attn_k_b.weight": (key, kinds[0]), "blk.1.attn_v_b.weight": (value, kinds[1])}
    stored = {name: (gguf.quantize(array, kind), kind) for name, (array, kind) in parts.items()}
    joined = load(write(tmp_path / "a.gguf", {}, stored))["blk.1.attn_kv_b.weight"]
    expected = np.concatenate([np.concatenate((key[head].T, value[head])) for head in range(2)])
    assert joined.dtype == (np.float16 if kinds[1] == Type.F16 else np.float32)
    np.testing.assert_allclose(joined, expected, atol=0.02)
    del stored["blk.1.attn_v_b.weight"]
    with pytest.raises(CheckpointError, match=r"attn_k_b\.weight: expected blk\.1\.attn_v_b\.weight beside it"):
        load(write(tmp_path / "b.gguf", {}, stored))


def altered(path: Path, change: Any) -> Path:
    """The file with the description of its first tensor changed: bytes of shape, type and offset."""
    data = bytearray(path.read_bytes())
    at = data.index(b"output.weight") + len(b"output.weight") + 4
    change(data, at)
    path.write_bytes(data)
    return path


def put(offset: int, value: int, width: int) -> Any:
    def change(data: bytearray, at: int) -> None:
        data[at + offset : at + offset + width] = value.to_bytes(width, "little")

    return change


LIES = [
    (put(0, 2**59, 8), r"truncated: shape \[8, 576460752303423488\] in Q8_0 ends at byte \d+, the file has \d+"),
    (put(8, 2**63, 8), "truncated: shape"),
    (put(0, 48, 8), "rows of 48 are not whole blocks of 32, as Q8_0 needs"),
    (put(16, 99, 4), "type 99 is not supported; supported: F32, F16, Q4_0, Q4_1"),
    (put(16, int(Type.Q8_K), 4), "type Q8_K is not supported; supported: F32"),
    (put(16, int(Type.I32), 4), "type I32 is not supported"),
    (put(8, 9, 8), "its data overlaps that of output"),
    (put(20, 32, 8), "its data overlaps that of output"),
]


@pytest.mark.parametrize(("change", "message"), LIES, ids=[message[:40] for _, message in LIES])
def test_lies_are_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    data = gguf.quantize(np.ones((8, 32), np.float32), Type.Q8_0)
    path = write(tmp_path / "a.gguf", {}, {"output.weight": (data, Type.Q8_0), "zz.weight": (data, Type.Q8_0)})
    load(path)
    with pytest.raises(CheckpointError, match=rf"a\.gguf: tensor (output|zz)\.weight: {message}"):
        load(altered(path, change))


def test_truncated_data_is_named(tmp_path: Path) -> None:
    data = gguf.quantize(np.ones((8, 32), np.float32), Type.Q8_0)
    path = write(tmp_path / "a.gguf", {}, {"a.weight": (data, Type.Q8_0), "b.weight": (data, Type.Q8_0)})
    info = read_gguf(path).tensors["b.weight"]
    path.write_bytes(path.read_bytes()[: info.start + data.size - 1])
    with pytest.raises(CheckpointError, match=r"tensor b\.weight: truncated: shape \[8, 32\] in Q8_0 ends at byte"):
        load(path)
