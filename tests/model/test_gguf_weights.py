from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from shoal.model.checkpoint.gguf_file import read_gguf
from shoal.model.checkpoint.gguf_weights import own_name, read_gguf_weights
from shoal.scheduler.errors import CheckpointError
from tests.gguf_writer import write

PLAIN = {Type.F32: np.float32, Type.F16: np.float16, Type.BF16: np.uint16}
QUANTISED = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K]


def load(path: Path, num_heads: int = 1, num_experts: int = 0) -> dict[str, Any]:
    weights = read_gguf_weights(read_gguf(path), num_heads=num_heads, num_kv_heads=num_heads, num_experts=num_experts)
    return dict(weights.tensors)


def blocks(kind: Type, shape: tuple[int, ...], seed: int = 0) -> Any:
    """Bytes of random blocks.  What is a scale in float16 is kept finite; every other byte may be anything."""
    size, width = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // size, width), np.uint8)
    scales = {Type.Q6_K: [208], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q4_1: [0, 2], Type.Q5_1: [0, 2]}
    for offset in scales.get(kind, [0]):
        data[..., offset + 1] &= 0b1011_1011  # an exponent below the one of infinity
    return data.reshape(*shape[:-1], -1)


@pytest.mark.parametrize("kind", QUANTISED)
def test_blocks_become_the_numbers_of_the_library(kind: Type, tmp_path: Path) -> None:
    """In matrices of several parts, of less than one, and in a stack of experts."""
    shapes = {"output.weight": (700, 1024), "token_embd.weight": (3, 256), "blk.0.ffn_up_exps.weight": (2, 40, 512)}
    stored = {name: blocks(kind, shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    path = write(tmp_path / "a.gguf", {}, {name: (data, kind) for name, data in stored.items()})
    tensors = load(path, num_experts=2)
    expected = {name: gguf.dequantize(data, kind) for name, data in stored.items()}
    up = expected.pop("blk.0.ffn_up_exps.weight")
    expected |= {f"blk.0.ffn_up.{i}.weight": matrix for i, matrix in enumerate(up)}
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert tensors[name].dtype == np.float32 and tensors[name].flags.c_contiguous
        np.testing.assert_array_equal(tensors[name], array)


@pytest.mark.parametrize(("kind", "steps"), [(Type.Q8_0, 254), (Type.Q4_0, 16), (Type.Q4_1, 15), (Type.Q5_1, 31)])
def test_quantised_numbers_come_back_within_a_step(kind: Type, steps: int, tmp_path: Path) -> None:
    numbers = np.random.default_rng(1).uniform(-1, 1, (64, 96)).astype(np.float32)
    path = write(tmp_path / "a.gguf", {}, {"output.weight": (gguf.quantize(numbers, kind), kind)})
    error = np.abs(load(path)["output.weight"] - numbers)
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


def test_a_quantised_file_is_not_held(tmp_path: Path) -> None:
    """Its pages would count as the engine's memory for as long as any view of it lives."""
    numbers = np.ones((4, 32), np.float32)
    stored = {"a.weight": (numbers, Type.F32), "b.weight": (gguf.quantize(numbers, Type.Q8_0), Type.Q8_0)}
    path = write(tmp_path / "a.gguf", {}, stored)
    tensors = load(path)
    assert str(path) not in Path("/proc/self/maps").read_text()
    np.testing.assert_array_equal(tensors["a.weight"], numbers)


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0])
def test_rows_that_turn_together_are_half_a_head_apart(kind: Type, tmp_path: Path) -> None:
    """Two heads of six rows; each row holds its own number."""
    rows = np.repeat(np.arange(12, dtype=np.float32), 32).reshape(12, 32)
    tensors = {f"blk.3.attn_{p}.weight": (gguf.quantize(rows, kind), kind) for p in "qkv"}
    found = load(write(tmp_path / "a.gguf", {}, tensors), num_heads=2)
    for part in "qk":
        order = found[f"blk.3.attn_{part}.weight"][:, 0].round()
        assert order.tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert found["blk.3.attn_v.weight"][:, 0].round().tolist() == list(range(12))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.11.self_attn.o_proj.weight", "blk.11.attn_output.weight"),
        ("model.layers.2.post_attention_layernorm.weight", "blk.2.ffn_norm.weight"),
        ("model.layers.0.block_sparse_moe.gate.weight", "blk.0.ffn_gate_inp.weight"),
        ("model.layers.0.block_sparse_moe.experts.7.w3.weight", "blk.0.ffn_up.7.weight"),
        ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert own_name(name) == expected


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
    (put(16, 99, 4), "type 99 is not supported; supported: F32, F16, BF16, Q4_0"),
    (put(16, int(Type.IQ2_XS), 4), "type IQ2_XS is not supported; supported: F32"),
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
