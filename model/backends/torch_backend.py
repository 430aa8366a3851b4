"""The readable backend: it executes a `ModelRecord` with torch on CPU or CUDA; native is tested against it."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shoal.model.backends.rope import rope_tables
from shoal.model.backends.stepwise import draft_stepwise
from shoal.model.backends.torch_attention import CacheLayout, attend, clear_fresh_blocks, plan_attention
from shoal.model.backends.torch_layers import (
    ExpertWeights,
    FeedForwardWeights,
    LayerWeights,
    feed_forward,
    linear,
    rms_norm,
    rotate_,
)
from shoal.model.backends.torch_sampler import sample
from shoal.model.record import Array, Experts, FeedForward, Layer, ModelRecord
from shoal.model.step.batch import DraftBatch, Float32, ForwardBatch, Int32, SamplerOutput, SamplingBatch


class TorchBackend:
    """Implements `shoal.model.step.batch.Backend`.

    Args:
        device: as torch names it, such as "cpu" or "cuda:0".
        dtype: of weights, KV cache and activations; router shares, softmax and logits are always computed in float32.
        num_blocks, block_size: of the KV cache, which the constructor allocates.
        num_threads: of torch's pool, which the whole process shares; None leaves it unchanged.
    """

    def __init__(
        self,
        record: ModelRecord,
        *,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
        num_blocks: int,
        block_size: int,
        num_threads: int | None = None,
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        config = record.config
        self._config = config
        self._device = torch.device(device)
        self._dtype = torch.float32 if dtype == "float32" else torch.bfloat16
        self._embedding = self._load(record.embedding)
        self._layers = [self._load_layer(layer) for layer in record.layers]
        self._norm = self._load(record.norm)
        self._head = self._embedding if record.head is record.embedding else self._load(record.head)
        self._layout = CacheLayout(config, num_blocks, block_size, self._device, self._dtype)
        self._kv_cache = torch.zeros(
            (config.num_layers, 2 * config.num_kv_heads * num_blocks, block_size, config.head_dim),
            dtype=self._dtype,
            device=self._device,
        )
        num_positions = min(config.max_position_embeddings, num_blocks * block_size)
        cos, sin = rope_tables(config.rope, config.head_dim, num_positions)
        self._cos = self._load(np.stack((cos, cos), axis=1)[:, None])
        self._sin = self._load(np.stack((-sin, sin), axis=1)[:, None])

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    @property
    def hidden_size(self) -> int:
        return self._config.hidden_size

    @torch.inference_mode()
    def execute(self, batch: ForwardBatch, sampling: SamplingBatch) -> SamplerOutput:
        return sample(self._logits(batch), sampling)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, num_layers: int | None = None) -> Float32:
        logits: Float32 = self._logits(batch, num_layers).cpu().numpy()
        return logits

    @torch.inference_mode()
    def draft(self, batch: DraftBatch, sampling: SamplingBatch, num_layers: int | None = None) -> Int32:
        def choose(step: ForwardBatch, how: SamplingBatch) -> Int32:
            return sample(self._logits(step, num_layers), how).token_ids

        return draft_stepwise(choose, batch, sampling)

    def _logits(self, batch: ForwardBatch, num_layers: int | None = None) -> Tensor:
        """[num_logits, vocab_size] float32."""
        x = self._hidden(batch, num_layers).index_select(0, self._index(batch.logits_indices))
        x = rms_norm(x, self._norm, self._config.rms_norm_eps)
        if batch.hidden is not None:
            batch.hidden[:] = x.float().cpu().numpy()
        return linear(x, self._head).float()

    def _hidden(self, batch: ForwardBatch, num_layers: int | None = None) -> Tensor:
        """Run the first `num_layers` layers, or all; hidden states [num_tokens, hidden_size] before the last norm."""
        eps, num_heads, num_kv_heads = self._config.rms_norm_eps, self._config.num_heads, self._config.num_kv_heads
        plan = plan_attention(batch, self._layout)
        clear_fresh_blocks(self._kv_cache, plan)
        positions = self._index(batch.positions)
        cos, sin = self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        x = self._embedding.index_select(0, self._index(batch.token_ids))
        for layer, kv_cache in zip(self._layers[:num_layers], self._kv_cache, strict=False):
            heads = linear(rms_norm(x, layer.input_norm, eps), layer.qkv)
            heads = heads.view(len(x), num_heads + 2 * num_kv_heads, -1)
            rotate_(heads[:, : num_heads + num_kv_heads], cos, sin)
            attended = attend(heads[:, :num_heads], heads[:, num_heads:], kv_cache, plan)
            x = x + linear(attended, layer.output)
            x = x + feed_forward(rms_norm(x, layer.post_attention_norm, eps), layer.feed_forward)
        return x

    def _index(self, array: Int32) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _load(self, *arrays: Array) -> Tensor:
        """The arrays, one below the other, in the backend's dtype and on its device."""
        tensors = [torch.from_numpy(np.array(array)) for array in arrays]
        tensors = [t.view(torch.bfloat16) if t.dtype == torch.uint16 else t for t in tensors]
        return torch.cat([t.to(self._device, self._dtype) for t in tensors])

    def _load_layer(self, layer: Layer) -> LayerWeights:
        attention = layer.attention
        return LayerWeights(
            input_norm=self._load(layer.input_norm),
            qkv=self._load(attention.q_proj, attention.k_proj, attention.v_proj),
            output=self._load(attention.o_proj),
            post_attention_norm=self._load(layer.post_attention_norm),
            feed_forward=self._load_feed_forward(layer.feed_forward),
        )

    def _load_feed_forward(self, weights: FeedForward | Experts) -> FeedForwardWeights | ExpertWeights:
        if isinstance(weights, FeedForward):
            return FeedForwardWeights(self._load(weights.gate_proj, weights.up_proj), self._load(weights.down_proj))
        return ExpertWeights(
            router=self._load(weights.router),
            gate_up=torch.stack([self._load(e.gate_proj, e.up_proj) for e in weights.experts]),
            down=torch.stack([self._load(e.down_proj) for e in weights.experts]),
            num_experts_per_tok=self._config.num_experts_per_tok,
        )
