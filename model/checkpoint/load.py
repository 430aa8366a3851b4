"""Loads a checkpoint into a `ModelRecord`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shoal.model.checkpoint.config import load_config
from shoal.model.checkpoint.format import CheckpointFormat, open_checkpoint
from shoal.model.checkpoint.parts import Weights
from shoal.model.record import Array, Attention, Experts, FeedForward, Layer, ModelConfig, ModelRecord
from shoal.scheduler.errors import CheckpointError


def load_checkpoint(checkpoint: Path | CheckpointFormat) -> ModelRecord:
    """Read the config and all weights.  Arrays are views of the mapped files, loaded on access; quantised
    tensors of a GGUF file become float32.

    Raises:
        CheckpointError: naming the file, and the field or tensor: missing, malformed, of the wrong shape, of an
            unsupported kind, or unknown to the architecture.
    """
    opened = open_checkpoint(checkpoint)
    config = load_config(opened)
    tensors = _Tensors(opened.weights())
    record = _build(config, tensors)
    tensors.check_all_taken()
    return record


class _Tensors:
    """The tensors of a checkpoint, taken one by one with the shape that the config implies."""

    def __init__(self, weights: Weights) -> None:
        self._path = weights.path
        self._own_name = weights.own_name
        self._left = dict(weights.tensors)

    def __contains__(self, name: str) -> bool:
        return self._own_name(name) in self._left

    def take(self, name: str, *shape: int) -> Array:
        name = self._own_name(name)
        if name not in self._left:
            raise self._error(name, f"missing; expected shape {list(shape)}")
        array = self._left.pop(name)
        if array.shape != shape:
            raise self._error(name, f"expected shape {list(shape)}, found {list(array.shape)}")
        return array

    def take_equal(self, name: str, other: Array) -> None:
        """Take a tensor that must be equal to `other`."""
        if not np.array_equal(self.take(name, *other.shape), other):
            raise self._error(name, "differs from the embedding although config.json ties them")

    def check_all_taken(self) -> None:
        if extra := sorted(self._left):
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
    """Experts under the names of a transformers 5 state dict, which stacks them, gate above up."""
    count, hidden, width = config.num_experts, config.hidden_size, config.intermediate_size
    gate_up = tensors.take(f"{prefix}experts.gate_up_proj", count, 2 * width, hidden)
    down = tensors.take(f"{prefix}experts.down_proj", count, hidden, width)
    return Experts(
        router=tensors.take(f"{prefix}gate.weight", count, hidden),
        experts=tuple(FeedForward(gate_up[e, :width], gate_up[e, width:], down[e]) for e in range(count)),
    )
