"""Loads a Hugging Face checkpoint folder into a `ModelRecord`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from model.config import ModelConfig, load_config, read_json
from model.record import Array, Attention, Experts, FeedForward, Layer, ModelRecord
from model.safetensors_file import read_safetensors
from scheduler.errors import CheckpointError

BUNDLED = Path(__file__).parent / "bundled"

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Buffers that some files carry and that follow from the config.
_HARMLESS = re.compile(r".*\.rotary_emb\.inv_freq")


def resolve_checkpoint(name_or_path: str) -> Path:
    """The folder of a checkpoint: the given path, or the bundled model of that name.

    Raises:
        CheckpointError: listing the bundled names, if it is neither.
    """
    for folder in (Path(name_or_path), BUNDLED / name_or_path):
        if (folder / "config.json").is_file():
            return folder
    if Path(name_or_path).is_dir():
        raise CheckpointError(f"{name_or_path}: the folder holds no config.json", param="model")
    names = ", ".join(sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))) or "none"
    raise CheckpointError(
        f"{name_or_path!r} is neither a checkpoint folder nor a bundled model; bundled: {names}", param="model"
    )


def load_checkpoint(folder: Path) -> ModelRecord:
    """Read the config and all weights.  Arrays are views of the mapped files: what is not touched is not loaded.

    Raises:
        CheckpointError: naming the file, and the field or tensor: missing, malformed, of the wrong shape, of an
            unsupported kind, or unknown to the architecture.
    """
    config = load_config(folder)
    tensors = _Tensors(*_read_weights(folder))
    record = _build(config, tensors)
    tensors.check_all_taken()
    return record


def _read_weights(folder: Path) -> tuple[Path, dict[str, Array]]:
    """The tensors by name, and the file that speaks for them: the one file, or the index of the shards."""
    if (folder / _WEIGHTS).exists():
        return folder / _WEIGHTS, read_safetensors(folder / _WEIGHTS)
    index = folder / _INDEX
    if not index.exists():
        raise CheckpointError(f"{folder}: holds neither {_WEIGHTS} nor {_INDEX}", param=_WEIGHTS)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map: expected an object of file names", param=_INDEX)
    tensors: dict[str, Array] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file() or Path(shard).name != shard:
            raise CheckpointError(f"{index}: names the shard {shard}, which is not in the folder", param=_INDEX)
        tensors |= read_safetensors(folder / shard)
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{folder / shard}: tensor {name} is missing, though {_INDEX} names it", param=shard)
    return index, tensors


class _Tensors:
    """The tensors of a checkpoint, taken one by one with the shape that the config implies."""

    def __init__(self, path: Path, tensors: Mapping[str, Array]) -> None:
        self._path = path
        self._left = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, *shape: int) -> Array:
        if name not in self._left:
            raise self._error(name, f"missing; expected shape {list(shape)}")
        array = self._left.pop(name)
        if array.shape != shape:
            raise self._error(name, f"expected shape {list(shape)}, found {list(array.shape)}")
        return array

    def take_equal(self, name: str, other: Array) -> None:
        """Take a tensor that may only repeat another one."""
        if not np.array_equal(self.take(name, *other.shape), other):
            raise self._error(name, "differs from the embedding although config.json ties them")

    def check_all_taken(self) -> None:
        extra = sorted(name for name in self._left if not _HARMLESS.fullmatch(name))
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise self._error(extra[0], f"unknown to the architecture{more}")

    def _error(self, name: str, message: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: tensor {name}: {message}", param=self._path.name)


def _build(config: ModelConfig, tensors: _Tensors) -> ModelRecord:
    hidden, vocab = config.hidden_size, config.vocab_size
    embedding = tensors.take("model.embed_tokens.weight", vocab, hidden)
    if not config.tie_word_embeddings:
        head = tensors.take("lm_head.weight", vocab, hidden)
    else:
        head = embedding
        if "lm_head.weight" in tensors:
            tensors.take_equal("lm_head.weight", embedding)
    return ModelRecord(
        config=config,
        embedding=embedding,
        layers=tuple(_layer(config, tensors, f"model.layers.{i}.") for i in range(config.num_layers)),
        norm=tensors.take("model.norm.weight", hidden),
        head=head,
    )


def _layer(config: ModelConfig, tensors: _Tensors, prefix: str) -> Layer:
    hidden = config.hidden_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return Layer(
        input_norm=tensors.take(f"{prefix}input_layernorm.weight", hidden),
        attention=Attention(
            q_proj=tensors.take(f"{prefix}self_attn.q_proj.weight", q_size, hidden),
            k_proj=tensors.take(f"{prefix}self_attn.k_proj.weight", kv_size, hidden),
            v_proj=tensors.take(f"{prefix}self_attn.v_proj.weight", kv_size, hidden),
            o_proj=tensors.take(f"{prefix}self_attn.o_proj.weight", hidden, q_size),
        ),
        post_attention_norm=tensors.take(f"{prefix}post_attention_layernorm.weight", hidden),
        feed_forward=_feed_forward(config, tensors, prefix),
    )


def _feed_forward(config: ModelConfig, tensors: _Tensors, prefix: str) -> FeedForward | Experts:
    if not config.num_experts:
        return _dense(config, tensors, f"{prefix}mlp.", ("gate_proj", "up_proj", "down_proj"))
    if f"{prefix}mlp.experts.gate_up_proj" in tensors:
        return _fused_experts(config, tensors, f"{prefix}mlp.")
    prefix += "block_sparse_moe."
    return Experts(
        router=tensors.take(f"{prefix}gate.weight", config.num_experts, config.hidden_size),
        experts=tuple(
            _dense(config, tensors, f"{prefix}experts.{e}.", ("w1", "w3", "w2")) for e in range(config.num_experts)
        ),
    )


def _dense(config: ModelConfig, tensors: _Tensors, prefix: str, names: tuple[str, str, str]) -> FeedForward:
    gate, up, down = names
    hidden, width = config.hidden_size, config.intermediate_size
    return FeedForward(
        gate_proj=tensors.take(f"{prefix}{gate}.weight", width, hidden),
        up_proj=tensors.take(f"{prefix}{up}.weight", width, hidden),
        down_proj=tensors.take(f"{prefix}{down}.weight", hidden, width),
    )


def _fused_experts(config: ModelConfig, tensors: _Tensors, prefix: str) -> Experts:
    """The names of a transformers 5 state dict, which stacks the experts, gate above up."""
    count, hidden, width = config.num_experts, config.hidden_size, config.intermediate_size
    gate_up = tensors.take(f"{prefix}experts.gate_up_proj", count, 2 * width, hidden)
    down = tensors.take(f"{prefix}experts.down_proj", count, hidden, width)
    return Experts(
        router=tensors.take(f"{prefix}gate.weight", count, hidden),
        experts=tuple(FeedForward(gate_up[e, :width], gate_up[e, width:], down[e]) for e in range(count)),
    )
