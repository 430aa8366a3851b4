"""Multi-head latent attention (DeepSeek-V2, 2024) in its absorbed form.

A key's part without RoPE is k_up @ latent, so that a query's product with it is that of (query @ k_up) with the latent
itself.  Queries are taken into the latent's space, attend over the one latent of each token, and what they read is
taken out of that space by v_up.  The cache holds latents, each followed by the key part with RoPE, as one head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shoal.model.backends.torch_attention import attend
from shoal.model.backends.torch_layers import LinearWeights, NormWeights, linear, norm, pad_rows, rotate_
from shoal.model.backends.torch_plan import LayerStep


class LatentAttentionWeights(NamedTuple):
    """Those of `LatentAttention`, with rows of zeros in `k_up` and `v_up`.

    Attributes:
        k_up: [num_heads, rank, nope_dim], rows padded.
        v_up: [num_heads, value_dim, rank], rows padded.
    """

    q_down: LinearWeights | None
    q_down_norm: NormWeights | None
    q_proj: LinearWeights
    kv_down: LinearWeights
    kv_norm: NormWeights | None
    k_up: Tensor
    v_up: Tensor
    output: LinearWeights


def latent_attention(x: Tensor, weights: LatentAttentionWeights, step: LayerStep) -> Tensor:
    """[T, hidden] to [T, hidden]; the step's latents are written into the layer's cache."""
    num_heads, latent = step.config.num_heads, step.config.latent
    assert latent is not None
    source = norm(linear(x, weights.q_down), weights.q_down_norm) if weights.q_down else x
    queries = linear(source, weights.q_proj).view(len(x), num_heads, -1)
    entries = linear(x, weights.kv_down)[:, None]
    if step.rotation:
        for heads in (queries, entries):
            rotate_(heads[..., -latent.rope_dim :], *step.rotation)
    entries[..., : latent.rank].copy_(norm(entries[..., : latent.rank], weights.kv_norm))
    absorbed = _per_head(queries[..., : latent.nope_dim], weights.k_up, latent.rank)
    queries = torch.cat((absorbed, queries[..., latent.nope_dim :]), dim=-1)
    if step.temperature is not None:
        queries.mul_(step.temperature)
    attended = attend(queries, entries, step).view(len(x), num_heads, -1)
    values = _per_head(attended, weights.v_up, latent.value_dim)
    return linear(values.flatten(1), weights.output)


def _per_head(x: Tensor, weight: Tensor, out: int) -> Tensor:
    """Each head's product with its own weight, whose rows are padded: [T, num_heads, in] to [T, num_heads, out]."""
    result = torch.bmm(pad_rows(x.transpose(0, 1)), weight.mT)
    return result[:, : len(x), :out].transpose(0, 1)
