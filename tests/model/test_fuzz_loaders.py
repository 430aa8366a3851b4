"""Damaged files: whatever is in them, a loader gives a checkpoint or a CheckpointError, soon and in little memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from shoal.model.backends.native_backend import NativeBackend
from shoal.model.backends.native_library import supported_isas
from shoal.model.checkpoint.config import load_config, load_generation_defaults
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.record import ModelRecord
from shoal.model.text.tokenizer import Tokenizer
from shoal.scheduler.errors import CheckpointError
from tests.examples import examples
from tests.gguf_writer import write

# A loader may take a few times what the file holds, dequantised, beside the buffers that it works in.
MAX_BYTES = 40_000_000

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


@cache
def gguf_bytes(kind: str) -> bytes:
    """A whole model with its tokenizer, every tensor of another type."""
    byte_level = kind == "gpt2"
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", *(f"t{i}" for i in range(34))]
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.alignment": 32,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 32,
        "llama.block_count": 1,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.expert_count": 2,
        "llama.expert_used_count": 1,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 37,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }
    metadata |= {"tokenizer.ggml.merges": ["a b"]} if byte_level else {"tokenizer.ggml.scores": [0.5] * 40}
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": ((40, 32), Type.Q8_0),
        "output": ((40, 32), Type.Q4_0),
        "output_norm": ((32,), Type.F32),
        "rope_freqs": ((4,), Type.F32),
        "blk.0.attn_norm": ((32,), Type.F32),
        "blk.0.ffn_norm": ((32,), Type.F16),
        "blk.0.attn_q": ((32, 32), Type.Q4_1),
        "blk.0.attn_k": ((16, 32), Type.BF16),
        "blk.0.attn_v": ((16, 32), Type.Q5_0),
        "blk.0.attn_output": ((32, 32), Type.Q5_1),
        "blk.0.ffn_gate_inp": ((2, 32), Type.F32),
        "blk.0.ffn_gate_exps": ((2, 32, 32), Type.Q8_0),
        "blk.0.ffn_up_exps": ((2, 32, 32), Type.F16),
        "blk.0.ffn_down_exps": ((2, 32, 32), Type.F32),
    }
    tensors = {
        f"{name}.weight": (gguf.quantize(rng.uniform(0.5, 1, shape).astype(np.float32), kind), kind)
        for name, (shape, kind) in shapes.items()
    }
    with TemporaryDirectory() as folder:
        return write(Path(folder) / "a.gguf", metadata, tensors).read_bytes()


@cache
def safetensors_bytes() -> bytes:
    names = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (40, 32),
        "lm_head.weight": (40, 32),
        "model.norm.weight": (32,),
        "model.layers.0.input_layernorm.weight": (32,),
        "model.layers.0.post_attention_layernorm.weight": (32,),
        **{f"model.layers.0.self_attn.{name}.weight": (rows, 32) for name, rows in names.items()},
        **{f"model.layers.0.mlp.{name}_proj.weight": (32, 32) for name in ("gate", "up", "down")},
    }
    return save({name: np.ones(shape, np.float32) for name, shape in shapes.items()})


Damage = tuple[list[tuple[str, int, bytes]], int]

# Bytes that lengths, counts and types are often mistaken for.
values = st.sampled_from([b"\0", b"\xff", b"\x80", b"\x7f", b"\xff" * 8, b"\0" * 8, b"\x01" + b"\0" * 7]) | st.binary(
    min_size=1, max_size=8
)


def damages(whole: bytes, header: int) -> st.SearchStrategy[Damage]:
    """What to write over, put in and cut out of the header, and where the file ends."""
    edit = st.tuples(st.sampled_from(["over", "in", "out"]), st.integers(0, header), values)
    return st.tuples(st.lists(edit, max_size=3), st.just(len(whole)) | st.integers(0, len(whole)))


def damaged(whole: bytes, damage: Damage) -> bytes:
    edits, end = damage
    data = bytearray(whole)
    for kind, at, value in edits:
        data[at : at + len(value) * (kind != "in")] = value if kind != "out" else b""
    return bytes(data[:end])


def check(load: Callable[[], object]) -> None:
    """Load; anything but success and a CheckpointError passes through."""
    tracemalloc.start()
    try:
        load()
    except CheckpointError as error:
        assert error.message
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MAX_BYTES


def load_record(path: Path) -> None:
    """What loads can be read to the end, and packed: no view reaches beyond the file."""
    record: ModelRecord = load_checkpoint(path)
    assert record.num_parameters > 0
    for *_, array in record.tensors():
        array.tobytes()
    if supported_isas():
        NativeBackend(record, num_blocks=1, block_size=16, num_threads=1)


FUZZ = settings(max_examples=examples(250))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_damaged_gguf_file(kind: str, tmp_path: Path) -> None:
    whole = gguf_bytes(kind)
    path = tmp_path / "a.gguf"
    path.write_bytes(whole)
    load_record(path)
    Tokenizer.load(path)
    header = whole.index(b"blk.0.ffn_up_exps.weight") + 200

    @FUZZ
    @given(damages(whole, header))
    def fuzz(damage: Damage) -> None:
        path.write_bytes(damaged(whole, damage))
        check(lambda: load_record(path))
        check(lambda: (load_config(path), load_generation_defaults(path)))
        check(lambda: Tokenizer.load(path))

    fuzz()


def test_a_damaged_safetensors_file(tmp_path: Path) -> None:
    whole = safetensors_bytes()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole)
    load_record(tmp_path)
    header = 8 + int.from_bytes(whole[:8], "little")

    @FUZZ
    @given(damages(whole, header))
    def fuzz(damage: Damage) -> None:
        path.write_bytes(damaged(whole, damage))
        check(lambda: load_record(tmp_path))

    fuzz()


ENTRY = {"dtype": "F32", "shape": [40, 32], "data_offsets": [0, 5120]}
number = st.integers(-2, 2**70) | st.floats() | st.none() | st.text(max_size=2) | st.booleans() | st.just([])
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "", None, 3, [1]]),
        "shape": st.lists(number | st.sampled_from([40, 32]), max_size=4) | number,
        "data_offsets": st.lists(number | st.sampled_from([0, 5120]), max_size=3) | number,
    },
)


@settings(parent=FUZZ)
@given(entry=entries.map(lambda change: ENTRY | change) | number | st.dictionaries(st.text(), number))
def test_lies_in_a_safetensors_header(entry: Any) -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        header = json.dumps({"model.embed_tokens.weight": entry}).encode()
        content = len(header).to_bytes(8, "little") + header + bytes(5120)
        (Path(folder) / "model.safetensors").write_bytes(content)
        check(lambda: load_record(Path(folder)))
