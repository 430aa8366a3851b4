"""How the torch backend adds up what those who watch want to know."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from shoal.model.architecture import ModelConfig
from shoal.model.backends.observed import Observed
from shoal.model.backends.torch_experts import ExpertWeights
from shoal.model.backends.torch_sampler import sample
from shoal.model.backends.torch_weights import LayerWeights
from shoal.model.step.batch import SamplerOutput, SamplingBatch


def observed_on(device: torch.device, config: ModelConfig) -> Observed:
    """Sums of 0; those of experts lie on the device, so that no step waits for them."""
    observed = Observed.of(config)
    rows = observed.expert_rows
    return observed if rows is None else replace(observed, expert_rows=torch.from_numpy(rows).to(device))


def observed_layers(layers: Iterable[LayerWeights], observed: Observed | None) -> list[LayerWeights]:
    """The layers, whose mixtures add to `expert_rows` from now on, or to nothing."""
    return [
        layer._replace(
            feed_forward=layer.feed_forward._replace(
                rows=None if observed is None else observed.expert_rows[index, : layer.feed_forward.config.num_experts]
            )
        )
        if isinstance(layer.feed_forward, ExpertWeights)
        else layer
        for index, layer in enumerate(layers)
    ]


def sample_timed(logits: Tensor, sampling: SamplingBatch, observed: Observed) -> SamplerOutput:
    """Choose tokens as `sample` does, and add the time of that."""
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)  # what computes the logits may still run
    began = time.perf_counter()
    output = sample(logits, sampling)
    observed.sample_seconds[0] += time.perf_counter() - began
    return output
