from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.model.checkpoint.load import load_checkpoint
from shoal.model.numbers import Array
from shoal.model.record import Attention, FeedForward, Linear
from shoal.scheduler.errors import CheckpointError

Write = Callable[..., Path]


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def equal(found: Array, expected: torch.Tensor) -> bool:
    values = (found.astype(np.uint32) << 16).view(np.float32) if found.dtype == np.uint16 else found  # bits of bfloat16
    return np.array_equal(values, expected.float().numpy())


def test_every_tensor_lands_in_its_place(tiny_checkpoint: Write) -> None:
    folder = tiny_checkpoint("llama")
    record, tensors = load_checkpoint(folder), load_file(folder / "model.safetensors")
    assert equal(record.embedding, tensors["model.embed_tokens.weight"])
    assert equal(record.head.weight, tensors["lm_head.weight"])
    assert record.norm and record.norm.gain is not None and equal(record.norm.gain, tensors["model.norm.weight"])
    for i, layer in enumerate(record.layers):
        prefix = f"model.layers.{i}."
        assert isinstance(layer.feed_forward, FeedForward) and isinstance(layer.attention, Attention)
        for part, name in [
            (layer.input_norm, "input_layernorm"),
            (layer.feed_forward_norm, "post_attention_layernorm"),
            (layer.attention.q_proj, "self_attn.q_proj"),
            (layer.attention.k_proj, "self_attn.k_proj"),
            (layer.attention.v_proj, "self_attn.v_proj"),
            (layer.attention.o_proj, "self_attn.o_proj"),
            (layer.feed_forward.gate_proj, "mlp.gate_proj"),
            (layer.feed_forward.up_proj, "mlp.up_proj"),
            (layer.feed_forward.down_proj, "mlp.down_proj"),
        ]:
            array = part.weight if isinstance(part, Linear) else part and part.gain
            assert array is not None and equal(array, tensors[f"{prefix}{name}.weight"])


def test_tied_embeddings_are_one_array(tiny_checkpoint: Write) -> None:
    record = load_checkpoint(tiny_checkpoint("llama", tie_word_embeddings=True))
    assert record.head.weight is record.embedding


def test_a_head_beside_tied_embeddings_must_repeat_them(tiny_checkpoint: Write) -> None:
    folder = tiny_checkpoint("llama", tie_word_embeddings=True)
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load_checkpoint(folder)
    change(folder, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs from the embedding"):
        load_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_checkpoints_keep_their_bits(dtype: torch.dtype, tiny_checkpoint: Write) -> None:
    folder = tiny_checkpoint("llama")
    change(folder, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    record = load_checkpoint(folder)
    assert record.embedding.dtype == (np.uint16 if dtype == torch.bfloat16 else np.float16)
    assert equal(record.embedding, load_file(folder / "model.safetensors")["model.embed_tokens.weight"])


def test_a_sharded_checkpoint_is_the_same_model(tiny_model: Callable[..., object], tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "one")  # type: ignore[attr-defined]
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")  # type: ignore[attr-defined]
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load_checkpoint(tmp_path / "one"), load_checkpoint(tmp_path / "many")
    assert np.array_equal(one.head.weight, many.head.weight)
    assert np.array_equal(one.layers[1].attention.o_proj.weight, many.layers[1].attention.o_proj.weight)


def test_arrays_are_mapped_and_read_only(tiny_checkpoint: Write) -> None:
    record = load_checkpoint(tiny_checkpoint("llama"))
    assert not record.embedding.flags.owndata and not record.embedding.flags.writeable


def test_refuses_tensors_by_file_and_name(tiny_checkpoint: Write) -> None:
    folder = tiny_checkpoint("mixtral")
    gone = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    edits: list[tuple[Callable[[dict[str, torch.Tensor]], object], str]] = [
        (lambda t: t.pop(gone), rf"model\.safetensors: tensor {gone}: missing; expected shape \[48, 32\]"),
        (lambda t: t.update({gone: torch.zeros(32, 48)}), rf"{gone}: expected shape \[48, 32\], found \[32, 48\]"),
        (lambda t: t.update({gone: torch.zeros(48, 32, dtype=torch.int8)}), rf"{gone}: dtype I8 is not supported"),
        (lambda t: t.update({gone: torch.zeros(48, 32), "a.bias": torch.zeros(1)}), r"a\.bias: unknown to the archi"),
    ]
    for edit, message in edits:
        change(folder, edit)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(folder)


def test_rotary_buffers_are_harmless(tiny_checkpoint: Write) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load_checkpoint(change(tiny_checkpoint("llama"), lambda t: t.update({name: torch.zeros(4)})))


def test_refuses_damaged_files(tiny_checkpoint: Write) -> None:
    folder = tiny_checkpoint("llama")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged, message in [
        (whole[:-10], r"model\.safetensors: tensor .*: truncated: it ends"),
        (whole[:100], "truncated, or not a safetensors file"),
        (whole[:4], "truncated, or not a safetensors file"),
        (b"", "cannot be read"),
        (whole[:8] + b"?" + whole[9:], "header is not valid JSON"),
        (whole.replace(b'"shape":[96,32]', b'"shape":[96,33]', 1), "do not hold"),
        (whole.replace(b'"shape":[96,32]', b'"shape":[96,-2]', 1), "is not one of positive integers"),
        (whole.replace(b"layers.1.input_layernorm", b"layers.0.input_layernorm", 1), "a name appears twice"),
        (whole.replace(b'"shape":[96,32]', b'"shapo":[96,32]', 1), "malformed header entry"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_checkpoint(folder)


def test_tensors_at_odd_offsets_of_the_file_are_aligned(tiny_checkpoint: Write) -> None:
    """The format asks for no alignment, but code that takes their address does."""
    folder = tiny_checkpoint("llama")
    path = folder / "model.safetensors"
    whole, expected = path.read_bytes(), load_file(path)["model.embed_tokens.weight"].clone()
    length = int.from_bytes(whole[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + whole[8 : 8 + length] + b" " + whole[8 + length :])
    record = load_checkpoint(folder)
    assert record.embedding.flags.aligned
    assert equal(record.embedding, expected)


def test_refuses_a_bad_index(tiny_model: Callable[..., object], tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")  # type: ignore[attr-defined]
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first, shard = next(iter(good["weight_map"].items()))
    for weight_map, message in [
        (None, r"index\.json: weight_map: expected"),
        ({**good["weight_map"], first: "absent.safetensors"}, r"names the shard absent\.safetensors"),
        ({**good["weight_map"], first: "../config.json"}, r"names the shard \.\./config\.json"),
        ({**good["weight_map"], "ghost": shard}, rf"{shard}: tensor ghost is missing"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path)


def test_resolves_folders_and_bundled_names(
    tiny_checkpoint: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("llama")
    monkeypatch.setattr("shoal.model.checkpoint.find.BUNDLED", folder.parent)
    assert resolve_checkpoint(str(folder)) == folder
    assert resolve_checkpoint("llama") == folder
    with pytest.raises(
        CheckpointError, match=r"'gpt' is neither .* nor the name of a model; names: llama, smollm2-135m"
    ):
        resolve_checkpoint("gpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        resolve_checkpoint(str(tmp_path / "empty"))
