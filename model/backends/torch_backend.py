"""The readable backend: it executes a `ModelRecord` with torch on CPU or CUDA; native is tested against it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shoal.model.backends.observed import Observed
from shoal.model.backends.stepwise import draft_stepwise
from shoal.model.backends.torch_attention import AttentionWeights, attention
from shoal.model.backends.torch_experts import ExpertWeights, mixture_of_experts
from shoal.model.backends.torch_latent import LatentAttentionWeights, latent_attention
from shoal.model.backends.torch_layers import FeedForwardWeights, NormWeights, feed_forward, linear, norm
from shoal.model.backends.torch_observed import observed_layers, observed_on, sample_timed
from shoal.model.backends.torch_plan import CacheLayout, LayerStep, View, clear_fresh_blocks, plan_attention
from shoal.model.backends.torch_positions import PositionFactors
from shoal.model.backends.torch_ranks import Spread
from shoal.model.backends.torch_sampler import sample
from shoal.model.backends.torch_weights import Loader
from shoal.model.record import ModelRecord
from shoal.model.step.batch import DraftBatch, Float32, ForwardBatch, Int32, SamplerOutput, SamplingBatch


class TorchBackend:
    """Implements `shoal.model.step.batch.Backend`.

    Args:
        device: as torch names it, such as "cpu" or "cuda:0".
        dtype: of weights, KV cache and activations; router shares, softmax and logits are always computed in float32.
        num_blocks, block_size: of the KV cache, which the constructor allocates.
        num_threads: of torch's pool, which the whole process shares; None leaves it unchanged.
        first_layer: of those in the record, which may be a part of the model's: see `ParallelBackend`.
        spread: how these are spread over ranks; None if they are not.
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
        first_layer: int = 0,
        spread: Spread | None = None,
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        config = self._config = record.config
        self._device = torch.device(device)
        dtype_ = torch.float32 if dtype == "float32" else torch.bfloat16
        loader = Loader(config, self._device, dtype_, spread)
        own = slice(first_layer, first_layer + len(record.layers))
        self._layer_configs = config.layers[own]
        self._embedding = loader.array(record.embedding)
        self._layers = [loader.layer(*pair) for pair in zip(record.layers, self._layer_configs, strict=True)]
        self._norm = loader.norm(record.norm)
        self._head = loader.linear(record.head)
        if record.head.weight is record.embedding:
            self._head = self._head._replace(weight=self._embedding)
        self._embedding_norm = loader.norm(record.embedding_norm)
        num_positions = config.most_positions(num_blocks * block_size)
        self._positions = None if record.positions is None else loader.array(record.positions[:num_positions])
        self._factors = PositionFactors.of_all(config, num_positions, self._device, dtype_)
        self._layout = CacheLayout(config, num_blocks, block_size, self._device, dtype_)
        places = sorted({place for _, place in config.cache_places[own]})
        self._kv_cache = torch.zeros((len(places), *self._layout.shape), dtype=dtype_, device=self._device)
        self._places = [places.index(place) for _, place in config.cache_places[own]]
        self._observed: Observed | None = None
        self._views = [
            View(group, layer.window, layer.chunk)
            for (group, _), layer in zip(config.cache_places[own], self._layer_configs, strict=True)
        ]

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    @property
    def hidden_size(self) -> int:
        return self._config.hidden_size

    @torch.inference_mode()
    def execute(self, batch: ForwardBatch, sampling: SamplingBatch) -> SamplerOutput:
        logits = self._logits(batch)
        return sample_timed(logits, sampling, self._observed) if self._observed else sample(logits, sampling)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, num_layers: int | None = None) -> Float32:
        logits: Float32 = self._logits(batch, num_layers).cpu().numpy()
        return logits

    @torch.inference_mode()
    def draft(self, batch: DraftBatch, sampling: SamplingBatch, num_layers: int | None = None) -> Int32:
        def choose(step: ForwardBatch, how: SamplingBatch) -> Int32:
            return sample(self._logits(step, num_layers), how).token_ids

        return draft_stepwise(choose, batch, sampling)

    def observe(self, *, is_observed: bool) -> Observed | None:
        """Begin to add up what those who watch want to know of steps, or end that and return None."""
        self._observed = observed_on(self._device, self._config) if is_observed else None
        self._layers = observed_layers(self._layers, self._observed)
        return self._observed

    def _logits(self, batch: ForwardBatch, num_layers: int | None = None) -> Tensor:
        """[num_logits, vocab_size] float32."""
        x = self._hidden(batch, num_layers)
        if batch.hidden is not None:
            batch.hidden[:] = norm(x, self._norm).float().cpu().numpy()
        x = norm(x.index_select(0, self._index(batch.logits_indices)), self._norm)
        return self._finished(linear(x, self._head))

    def _finished(self, logits: Tensor) -> Tensor:
        """What the head gives, in float32, with what the family does to it."""
        logits = _scaled(logits.float(), self._config.logits_multiplier)
        cap = self._config.logit_softcap
        return (logits / cap).tanh_().mul_(cap) if cap else logits

    def _hidden(self, batch: ForwardBatch, num_layers: int | None = None) -> Tensor:
        """Run the first `num_layers` layers, or all; hidden states [num_tokens, hidden_size] before the last norm."""
        clear_fresh_blocks(self._kv_cache, batch, self._layout)
        positions = self._index(batch.positions)
        x = self._embed(batch, positions)
        for layer, step in zip(self._layers, self._steps(batch, positions, num_layers), strict=False):
            normed = norm(x, layer.input_norm)
            after = self._add(x, _attention(normed, layer.attention, step), layer.attention_output_norm)
            if not self._config.parallel:
                normed = norm(after, layer.feed_forward_norm)
            elif layer.feed_forward_norm:
                normed = norm(x, layer.feed_forward_norm)
            x = self._add(after, _feed_forward(normed, layer.feed_forward), layer.feed_forward_output_norm)
        return x

    def _steps(self, batch: ForwardBatch, positions: Tensor, num_layers: int | None) -> list[LayerStep]:
        """What the first `num_layers` layers, or all, need of the step."""
        factors = self._factors.at(positions)
        plans = {view: plan_attention(batch, self._layout, view) for view in dict.fromkeys(self._views[:num_layers])}
        return [
            LayerStep(
                self._config,
                self._kv_cache[place],
                plans[view],
                factors.ropes.get(layer.rope),
                factors.temperatures.get(layer.temperature),
            )
            for layer, view, place in zip(self._layer_configs[:num_layers], self._views, self._places, strict=False)
        ]

    def _embed(self, batch: ForwardBatch, positions: Tensor) -> Tensor:
        if batch.inputs is not None:
            return torch.from_numpy(batch.inputs).to(self._embedding)
        x = _scaled(self._look_up(self._index(batch.token_ids)), self._config.embedding_multiplier)
        if self._positions is not None:
            x = x + self._positions.index_select(0, positions)
        return norm(x, self._embedding_norm)

    def _look_up(self, token_ids: Tensor) -> Tensor:
        return self._embedding.index_select(0, token_ids)

    def _add(self, x: Tensor, output: Tensor, output_norm: NormWeights | None) -> Tensor:
        """Add the output of a block to the hidden states; both are [num_tokens, hidden_size]."""
        multiplier = self._config.residual_multiplier
        if self._config.norm_after_sum:
            return norm(x + _scaled(output, multiplier), output_norm)
        return x + _scaled(norm(output, output_norm), multiplier)

    def _index(self, array: Int32) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _scaled(x: Tensor, multiplier: float) -> Tensor:
    return x if multiplier == 1 else x * multiplier


def _attention(x: Tensor, weights: AttentionWeights | LatentAttentionWeights, step: LayerStep) -> Tensor:
    if isinstance(weights, AttentionWeights):
        return attention(x, weights, step)
    return latent_attention(x, weights, step)


def _feed_forward(x: Tensor, weights: FeedForwardWeights | ExpertWeights) -> Tensor:
    if isinstance(weights, FeedForwardWeights):
        return feed_forward(x, weights)
    return mixture_of_experts(x, weights)
