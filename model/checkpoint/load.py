"""Loads a checkpoint into a `ModelRecord`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from shoal.model.architecture import LayerConfig, MixtureConfig, ModelConfig
from shoal.model.checkpoint.config import read_config
from shoal.model.checkpoint.families import Tensors
from shoal.model.checkpoint.families.transform import by_parts, halves, sinusoids
from shoal.model.checkpoint.format import CheckpointFormat, open_checkpoint
from shoal.model.checkpoint.parts import Weights
from shoal.model.checkpoint.tensors import FileTensors, ImpliedTensors
from shoal.model.numbers import Array, has_blocks, in_float32, shape_of
from shoal.model.record import (
    Attention,
    Experts,
    FeedForward,
    LatentAttention,
    Layer,
    Linear,
    ModelRecord,
    Norm,
)


def load_checkpoint(checkpoint: Path | CheckpointFormat) -> ModelRecord:
    """Read the config and all weights.  Arrays are views of the mapped files, loaded on access, where the file has
    them as the record does.

    Raises:
        CheckpointError: naming the file, and the field or tensor: missing, malformed, of the wrong shape, of an
            unsupported kind, or unknown to the architecture.
    """
    opened = open_checkpoint(checkpoint)
    return _load(opened, opened.weights())


def outline_checkpoint(checkpoint: Path | CheckpointFormat) -> ModelRecord:
    """The record with zeros for all numbers, which takes hardly any memory: of the weights only headers are read.

    Raises:
        CheckpointError: see `load_checkpoint`.
    """
    opened = open_checkpoint(checkpoint)
    return _load(opened, opened.outline())


def imply_record(path: Path, config: ModelConfig, tensors: Tensors) -> ModelRecord:
    """The record that a configuration implies, with zeros for all numbers; no file of weights need be there.

    Shapes are those of the loaded model.  What a loader would put in another order, or make, is zeros as well.
    """
    tensors = replace(tensors, transposed=False, interleaved=False, experts_transposed=False, qkv=by_parts)
    if tensors.sinusoidal:
        tensors = replace(tensors, sinusoidal=False, names={**tensors.names, "positions": ("positions",)})
    stored = np.dtype({"bfloat16": "uint16"}.get(config.dtype, config.dtype))
    return RecordBuilder(config, tensors, ImpliedTensors(path, tensors, stored)).record()


def _load(opened: CheckpointFormat, weights: Weights) -> ModelRecord:
    config, tensors = read_config(opened.config())
    tensors = opened.own_tensors(tensors)
    file = FileTensors(weights, tensors)
    record = RecordBuilder(config, tensors, file).record()
    further = range(config.num_layers, config.num_layers + tensors.further_layers)
    file.check_all_taken(left_out=tuple(tensors.names["layer"][0].format(index) for index in further))
    return record


class RecordBuilder:
    """Takes the tensors of a file and makes the record of them."""

    def __init__(self, config: ModelConfig, tensors: Tensors, file: FileTensors) -> None:
        self._config = config
        self._tensors = tensors
        self._file = file

    def record(self) -> ModelRecord:
        config, tensors = self._config, self._tensors
        hidden, vocab = config.hidden_size, config.vocab_size
        projected = "project_in" in tensors.names
        embedding = self._file.take(self._name("embedding"), vocab, None if projected else hidden)
        head = self._head(embedding)
        if projected:  # into the embedding and the head, which are then two arrays
            inner = shape_of(embedding)[1]
            up, down = self._linear("project_in", hidden, inner), self._linear("project_out", inner, hidden)
            head = Linear(in_float32(head.weight) @ in_float32(down.weight))
            embedding = in_float32(embedding) @ in_float32(up.weight).T
            config = replace(config, tie_word_embeddings=False)
        return ModelRecord(
            config=config,
            embedding=embedding,
            layers=tuple(
                self._layer(layer, tensors.names["layer"][0].format(index)) for index, layer in enumerate(config.layers)
            ),
            norm=self._norm("norm", hidden),
            head=head,
            positions=self._positions(),
            embedding_norm=self._norm("embedding_norm", hidden),
        )

    def _head(self, embedding: Array) -> Linear:
        weight, (vocab, width) = self._name("head"), shape_of(embedding)
        bias = self._file.take(self._name("head", suffix=".bias"), vocab) if self._tensors.has_bias("head") else None
        if not self._config.tie_word_embeddings:
            return Linear(self._file.take(weight, vocab, width), bias)
        if weight in self._file:
            self._file.take_equal(weight, embedding)
        return Linear(embedding, bias)

    def _positions(self) -> Array | None:
        tensors, count, hidden = self._tensors, self._config.max_position_embeddings, self._config.hidden_size
        first = tensors.first_position
        if tensors.sinusoidal:
            return sinusoids(count + first, hidden)[first:]
        return (
            self._file.take(self._name("positions"), count + first, hidden)[first:] if self._has("positions") else None
        )

    def _layer(self, layer: LayerConfig, prefix: str) -> Layer:
        config = self._config
        hidden = config.hidden_size
        attention = self._latent_attention(prefix) if config.latent else self._attention(layer, prefix)
        return Layer(
            input_norm=self._norm("input_norm", hidden, prefix),
            attention=attention,
            feed_forward_norm=self._norm("feed_forward_norm", hidden, prefix),
            feed_forward=self._experts(layer.mixture, prefix)
            if layer.mixture
            else self._feed_forward("", layer.intermediate_size, prefix),
            attention_output_norm=self._norm("attention_output_norm", hidden, prefix),
            feed_forward_output_norm=self._norm("feed_forward_output_norm", hidden, prefix),
        )

    def _attention(self, layer: LayerConfig, prefix: str) -> Attention:
        config = self._config
        hidden, heads, kv_heads, width = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        if self._has("qkv_proj"):
            fused = self._linear("qkv_proj", (heads + 2 * kv_heads) * width, hidden, prefix)
            weights = self._tensors.qkv(fused.weight, heads, kv_heads, width)
            biases = (None,) * 3 if fused.bias is None else self._tensors.qkv(fused.bias, heads, kv_heads, width)
            q, k, v = (Linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
        else:
            q = self._linear("q_proj", heads * width, hidden, prefix)
            k = self._linear("k_proj", kv_heads * width, hidden, prefix)
            v = self._linear("v_proj", kv_heads * width, hidden, prefix)
        q_norm, k_norm = self._head_norm("q_norm", heads, prefix), self._head_norm("k_norm", kv_heads, prefix)
        if self._tensors.norms_with_rope and not layer.rope:
            q_norm, k_norm = None, None
        if self._tensors.interleaved and layer.rope:
            dim = layer.rope.dim
            q, q_norm = _turned(q, heads, dim), _turned_norm(q_norm, heads, dim)
            k, k_norm = _turned(k, kv_heads, dim), _turned_norm(k_norm, kv_heads, dim)
        sinks = self._file.take(self._name("sinks", prefix, suffix=""), heads) if self._has("sinks") else None
        return Attention(q, k, v, self._linear("o_proj", hidden, heads * width, prefix), q_norm, k_norm, sinks)

    def _latent_attention(self, prefix: str) -> LatentAttention:
        config, latent = self._config, self._config.latent
        assert latent
        hidden, heads = config.hidden_size, config.num_heads
        inner = latent.query_rank or hidden
        q_down = self._linear("q_down", latent.query_rank, hidden, prefix) if latent.query_rank else None
        q = self._linear("q_up" if q_down else "q_proj", heads * config.head_dim, inner, prefix)
        kv_down = self._linear("kv_down", latent.rank + latent.rope_dim, hidden, prefix)
        up = self._linear("kv_up", heads * (latent.nope_dim + latent.value_dim), latent.rank, prefix).weight
        up = in_float32(up) if has_blocks(up) else up  # queries are multiplied with its columns
        up = up.reshape(heads, latent.nope_dim + latent.value_dim, latent.rank)
        if self._tensors.interleaved:
            q = _turned(q, heads, latent.rope_dim, last=True)
            kv_down = _turned(kv_down, 1, latent.rope_dim, last=True)
        kv_norm = self._norm("kv_norm", latent.rank, prefix)
        assert kv_norm
        return LatentAttention(
            q_down=q_down,
            q_down_norm=self._norm("q_down_norm", latent.query_rank, prefix) if q_down else None,
            q_proj=q,
            kv_down=kv_down,
            kv_norm=kv_norm,
            k_up=up[:, : latent.nope_dim],
            v_up=up[:, latent.nope_dim :],
            o_proj=self._linear("o_proj", hidden, heads * latent.value_dim, prefix),
        )

    def _feed_forward(self, kind: str, width: int, prefix: str, expert: int = 0) -> FeedForward:
        """A dense block, one expert or the shared expert; `kind` begins its parts."""
        hidden, gated = self._config.hidden_size, self._config.gated
        gate = None
        if self._has(f"{kind}gate_up_proj"):
            fused = self._linear(f"{kind}gate_up_proj", 2 * width, hidden, prefix)
            gate, up = _part(fused, slice(width)), _part(fused, slice(width, None))
        else:
            if gated:
                gate = self._linear(f"{kind}gate_proj", width, hidden, prefix, expert)
            up = self._linear(f"{kind}up_proj", width, hidden, prefix, expert)
        return FeedForward(gate, up, self._linear(f"{kind}down_proj", hidden, width, prefix, expert))

    def _experts(self, mixture: MixtureConfig, prefix: str) -> Experts:
        hidden, count = self._config.hidden_size, mixture.num_experts
        correction = self._name("correction", prefix, suffix="") if self._has("correction") else None
        return Experts(
            router=self._linear("router", count, hidden, prefix),
            experts=self._stacked_experts(mixture, prefix)
            or tuple(self._feed_forward("expert_", mixture.intermediate_size, prefix, e) for e in range(count)),
            correction=self._file.take_flat(correction, count) if correction else None,
            shared=self._feed_forward("shared_", mixture.shared_size, prefix) if mixture.shared_size else None,
            shared_gate=self._linear("shared_gate", 1, hidden, prefix) if self._has("shared_gate") else None,
        )

    def _stacked_experts(self, mixture: MixtureConfig, prefix: str) -> tuple[FeedForward, ...]:
        """The experts of a file that has them in one tensor; none if it has not."""
        count, hidden, width = mixture.num_experts, self._config.hidden_size, mixture.intermediate_size
        if not self._has("experts_down") or self._name("experts_down", prefix, suffix="") not in self._file:
            return ()
        down = self._stack("experts_down", count, hidden, width, prefix)
        if self._has("experts_gate"):
            gate = self._stack("experts_gate", count, width, hidden, prefix)
            up = self._stack("experts_up", count, width, hidden, prefix)
        else:
            both = self._stack("experts_gate_up", count, 2 * width, hidden, prefix)
            parts = slice(width), slice(width, None)
            if self._tensors.experts_alternate:
                parts = slice(0, None, 2), slice(1, None, 2)
            gate, up = ([_part(linear, part) for linear in both] for part in parts)
        return tuple(map(FeedForward, gate, up, down))

    def _stack(self, part: str, count: int, out: int, inner: int, prefix: str) -> list[Linear]:
        turned = self._tensors.experts_transposed
        stack = self._file.take(self._name(part, prefix, suffix=""), count, *((inner, out) if turned else (out, inner)))
        if turned:
            stack = np.ascontiguousarray(stack.swapaxes(1, 2))
        biases: list[Array] | list[None] = [None] * count
        if self._has(f"{part}_bias"):
            biases = list(self._file.take(self._name(f"{part}_bias", prefix, suffix=""), count, out))
        return [Linear(weight, bias) for weight, bias in zip(stack, biases, strict=True)]

    def _has(self, part: str) -> bool:
        return part in self._tensors.names

    def _name(self, part: str, prefix: str = "", *numbers: int, suffix: str = ".weight") -> str:
        return self._file.find(prefix, self._tensors.names[part], suffix, *numbers)

    def _linear(self, part: str, out: int, inner: int, prefix: str = "", expert: int = 0) -> Linear:
        turned = self._tensors.transposed
        weight = self._file.take(self._name(part, prefix, expert), *((inner, out) if turned else (out, inner)))
        bias = self._name(part, prefix, expert, suffix=".bias") if self._tensors.has_bias(part) else None
        return Linear(
            np.ascontiguousarray(weight.T) if turned else weight, self._file.take(bias, out) if bias else None
        )

    def _norm(self, part: str, width: int, prefix: str = "") -> Norm | None:
        if not self._has(part):
            return None
        if not self._tensors.gains:
            return Norm()
        gain = self._file.take(self._name(part, prefix), width)
        bias = self._name(part, prefix, suffix=".bias") if self._tensors.has_bias(part) else None
        return Norm(self._offset(gain), self._file.take(bias, width) if bias else None)

    def _head_norm(self, part: str, count: int, prefix: str) -> Norm | None:
        """The norm of queries or keys, which files have for all heads together, for every head alike, or one by one."""
        config = self._config
        if config.qk_norm != "head" or not self._has(part):
            return self._norm(part, count * config.head_dim, prefix)
        if not self._tensors.head_gains:
            return Norm()
        gain, bias = (
            self._file.take_heads(
                [self._name(part, prefix, head, suffix=suffix) for head in range(count)], config.head_dim
            )
            if suffix == ".weight" or self._tensors.has_bias(part)
            else None
            for suffix in (".weight", ".bias")
        )
        assert gain is not None
        return Norm(self._offset(gain), bias)

    def _offset(self, gain: Array) -> Array:
        offset = self._tensors.gain_offset
        return in_float32(gain) + np.float32(offset) if offset else gain


def _turned(linear: Linear, num_heads: int, dim: int, *, last: bool = False) -> Linear:
    """The projection with its output in the record's order: see `halves`."""
    bias = None if linear.bias is None else halves(linear.bias, num_heads, dim, last=last)
    return Linear(halves(linear.weight, num_heads, dim, last=last), bias)


def _turned_norm(norm: Norm | None, num_heads: int, dim: int) -> Norm | None:
    if norm is None:
        return None
    gain, bias = (array if array is None else halves(array, num_heads, dim) for array in (norm.gain, norm.bias))
    return Norm(gain, bias)


def _part(linear: Linear, rows: slice) -> Linear:
    return Linear(linear.weight[rows], None if linear.bias is None else linear.bias[rows])
