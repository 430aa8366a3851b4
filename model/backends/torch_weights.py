"""Brings the arrays of a `ModelRecord` into the form that torch computes with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.model.architecture import LayerConfig, MixtureConfig, ModelConfig, NormKind
from shoal.model.backends.torch_activations import activation
from shoal.model.backends.torch_attention import AttentionWeights
from shoal.model.backends.torch_experts import ExpertWeights, grouped_width
from shoal.model.backends.torch_latent import LatentAttentionWeights
from shoal.model.backends.torch_layers import COLUMNS, FeedForwardWeights, LinearWeights, NormWeights, pad_rows
from shoal.model.backends.torch_ranks import Spread
from shoal.model.numbers import Array, has_blocks, in_float32
from shoal.model.record import Attention, Experts, FeedForward, LatentAttention, Layer, Linear, Norm


class LayerWeights(NamedTuple):
    """One layer; see `Layer`."""

    input_norm: NormWeights | None
    attention: AttentionWeights | LatentAttentionWeights
    attention_output_norm: NormWeights | None
    feed_forward_norm: NormWeights | None
    feed_forward: FeedForwardWeights | ExpertWeights
    feed_forward_output_norm: NormWeights | None


class Loader:
    """Copies arrays to a device, with the dtype that the backend computes in.

    Args:
        spread: how layers are spread over ranks; None if they are not.
    """

    def __init__(
        self, config: ModelConfig, device: torch.device, dtype: torch.dtype, spread: Spread | None = None
    ) -> None:
        self._config, self._device, self._dtype = config, device, dtype
        self._spread = spread
        self._column_ranks = spread.ranks if spread and spread.columns else None

    def array(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(in_float32(array) if has_blocks(array) else np.array(array))
        tensor = tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
        return tensor.to(self._device, self._dtype)

    def linear(self, *layers: Linear | None) -> LinearWeights:
        """The layers that there are, one below the other."""
        there = [layer for layer in layers if layer]
        weight = torch.cat([self.array(layer.weight) for layer in there])
        if all(layer.bias is None for layer in there):
            return LinearWeights(weight)
        biases = [weight.new_zeros(len(x.weight)) if x.bias is None else self.array(x.bias) for x in there]
        return LinearWeights(weight, torch.cat(biases))

    def spread_linear(self, layer: Linear) -> LinearWeights:
        """The layer, of which the columns of inputs and outputs may be spread."""
        return self.linear(layer)._replace(ranks=self._column_ranks)

    def norm(self, norm: Norm | None) -> NormWeights | None:
        config = self._config
        return None if norm is None else self._norm(norm, config.norm, config.norm_eps)

    def layer(self, layer: Layer, config: LayerConfig) -> LayerWeights:
        attention, block = layer.attention, layer.feed_forward
        return LayerWeights(
            input_norm=self.norm(layer.input_norm),
            attention=self._attention(attention)
            if isinstance(attention, Attention)
            else self._latent_attention(attention),
            attention_output_norm=self.norm(layer.attention_output_norm),
            feed_forward_norm=self.norm(layer.feed_forward_norm),
            feed_forward=self._experts(block, config.mixture)
            if isinstance(block, Experts)
            else self._feed_forward(block),
            feed_forward_output_norm=self.norm(layer.feed_forward_output_norm),
        )

    def _norm(self, norm: Norm, kind: NormKind, eps: float, shape: Sequence[int] = (-1,)) -> NormWeights:
        gain, bias = (None if x is None else self.array(x).view(*shape) for x in (norm.gain, norm.bias))
        return NormWeights(kind, eps, gain, bias)

    def _attention(self, attention: Attention) -> AttentionWeights:
        config = self._config
        shape = (-1, config.head_dim) if config.qk_norm == "head" else (-1,)
        norms = [norm for norm in (attention.q_norm, attention.k_norm) if norm]
        return AttentionWeights(
            qkv=self.linear(attention.q_proj, attention.k_proj, attention.v_proj),
            output=self.spread_linear(attention.o_proj),
            norms=tuple(self._norm(norm, config.qk_norm_kind, config.qk_norm_eps, shape) for norm in norms),
            sinks=None if attention.sinks is None else self.array(attention.sinks),
        )

    def _latent_attention(self, attention: LatentAttention) -> LatentAttentionWeights:
        assert self._config.latent is not None
        down_norm, eps = attention.q_down_norm, self._config.latent.norm_eps
        return LatentAttentionWeights(
            q_down=self.linear(attention.q_down) if attention.q_down else None,
            q_down_norm=self._norm(down_norm, "rms", eps) if down_norm else None,
            q_proj=self.linear(attention.q_proj),
            kv_down=self.linear(attention.kv_down),
            kv_norm=self._norm(attention.kv_norm, "rms", eps),
            k_up=pad_rows(self.array(attention.k_up).mT, COLUMNS).contiguous(),
            v_up=pad_rows(self.array(attention.v_up), COLUMNS),
            output=self.spread_linear(attention.o_proj),
        )

    def _feed_forward(self, block: FeedForward) -> FeedForwardWeights:
        up = self.linear(block.gate_proj, block.up_proj)
        activate = activation(self._config.activation, gated=self._config.gated)
        return FeedForwardWeights(up, self.spread_linear(block.down_proj), activate)

    def _experts(self, block: Experts, config: MixtureConfig | None) -> ExpertWeights:
        assert config is not None
        parts = [("gate_proj", "up_proj") if self._config.gated else ("up_proj",), ("down_proj",)]
        (up, up_bias), (down, down_bias) = (
            self._stack([[getattr(expert, name) for name in names] for expert in block.experts]) for names in parts
        )
        return ExpertWeights(
            config=config,
            router=self.linear(block.router),
            correction=None if block.correction is None else self.array(block.correction).float(),
            up=up,
            up_bias=up_bias,
            down=down,
            down_bias=down_bias,
            activate=activation(self._config.activation, gated=self._config.gated),
            width=len(block.experts[0].up_proj.weight),
            out=len(block.experts[0].down_proj.weight),
            spread=self._spread,
            shared=self._feed_forward(block.shared) if block.shared else None,
            shared_gate=self.linear(block.shared_gate) if block.shared_gate else None,
        )

    def _stack(self, experts: Sequence[Sequence[Linear]]) -> tuple[Tensor, Tensor | None]:
        """The layers of each expert one below the other, each padded: [num_experts, out, in], and biases."""

        def padded(layer: Linear) -> LinearWeights:
            weight, bias, _ = self.linear(layer)
            rows, columns = (grouped_width(size) - size for size in weight.shape)
            return LinearWeights(F.pad(weight, (0, columns, 0, rows)), None if bias is None else F.pad(bias, (0, rows)))

        stacks = [[padded(layer) for layer in layers] for layers in experts]
        weight = torch.stack([torch.cat([layer.weight for layer in layers]) for layers in stacks])
        biases = [layer.bias for layers in stacks for layer in layers if layer.bias is not None]
        return weight, torch.cat(biases).view(len(stacks), -1) if biases else None
