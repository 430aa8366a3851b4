"""Attention over the paged KV cache, for sequences with any number of queries and any context.

Gathering rows of the cache gives keys and values that need no further copy.  Which rows, and what a query sees of them,
is in the plan that `torch_plan.py` makes once a step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.model.architecture import ModelConfig
from shoal.model.backends.torch_layers import COLUMNS, LinearWeights, NormWeights, linear, norm, pad_rows, rotate_
from shoal.model.backends.torch_plan import STRETCH, LayerStep


class AttentionWeights(NamedTuple):
    """Grouped-query attention.

    Attributes:
        qkv: to (num_heads + 2 * num_kv_heads) * head_dim, the projections before attention.
        output: from num_heads * head_dim, the projection after it.
        norms: of queries and of keys; empty if there are none.
        sinks: [num_heads].
    """

    qkv: LinearWeights
    output: LinearWeights
    norms: tuple[NormWeights, ...]
    sinks: Tensor | None


def attention(x: Tensor, weights: AttentionWeights, step: LayerStep) -> Tensor:
    """[T, hidden] to [T, hidden]; the step's keys and values are written into the layer's cache."""
    num_heads, num_kv_heads = step.config.num_heads, step.config.num_kv_heads
    heads = linear(x, weights.qkv).view(x.shape[0], num_heads + 2 * num_kv_heads, -1)
    if weights.norms and not step.config.qk_norm_after_rope:
        _normalise_(heads, weights, step.config)
    if step.rotation:
        rotate_(heads[:, : num_heads + num_kv_heads], *step.rotation)
    if weights.norms and step.config.qk_norm_after_rope:
        _normalise_(heads, weights, step.config)
    if step.temperature is not None:
        heads[:, :num_heads].mul_(step.temperature)
    return linear(attend(heads[:, :num_heads], heads[:, num_heads:], step, weights.sinks), weights.output)


def attend(queries: Tensor, keys_values: Tensor, step: LayerStep, sinks: Tensor | None = None) -> Tensor:
    """Write the step's keys and values, then attend.

    Args:
        queries: [T, num_heads, key_width].
        keys_values: [T, num_kinds * num_kv_heads, key_width], keys first.

    Returns:
        [T, num_heads * value_width].
    """
    (num_tokens, num_heads, width), layout = queries.shape, step.config.kv_layouts[0]
    num_kv_heads, value_width, num_kinds = layout.num_heads, layout.value_width, 1 if layout.shared else 2
    step.kv_cache.view(-1, width).index_copy_(0, step.plan.write_index, keys_values.reshape(-1, width))
    output = queries.new_empty(num_tokens, num_heads * value_width)
    for group in step.plan.groups:
        n, mask = group.num_queries, group.mask
        kinds = step.kv_cache.index_select(0, group.cache_rows).view(num_kinds, len(mask), -1, width)
        keys, values = kinds[0], kinds[-1, ..., :value_width]
        q = queries[group.tokens].view(-1, n, num_kv_heads, num_heads // num_kv_heads, width)
        q = pad_rows(q.transpose(1, 2).reshape(len(mask), -1, width))
        scores = _scores(q, keys, mask, step.config)
        if sinks is not None:
            scores = torch.cat((_sink_columns(sinks, n, scores, num_kv_heads), scores), dim=-1)
        shares = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)[..., -mask.shape[-1] :]
        result = weighted_sum(shares, values)[:, : n * num_heads // num_kv_heads]
        result = result.reshape(-1, num_kv_heads, n, num_heads // num_kv_heads, value_width)
        output[group.tokens] = result.transpose(1, 2).reshape(-1, num_heads * value_width)
    return output


def weighted_sum(shares: Tensor, values: Tensor) -> Tensor:
    """shares @ values: [B, n, L] by [B, L, width] to [B, n, width]; n must be a multiple of 4.

    The sum over positions is taken in short stretches: MKL adds up longer ones in an order that depends on L, and L
    depends on the other sequences.  Shares past a context are 0 and change nothing.
    """
    width = values.shape[2]
    if width < COLUMNS:
        values = F.pad(values, (0, COLUMNS - width))
    result = torch.bmm(shares[:, :, :STRETCH], values[:, :STRETCH])
    for start in range(STRETCH, shares.shape[2], STRETCH):
        end = start + STRETCH
        result.baddbmm_(shares[:, :, start:end], values[:, start:end])
    return result[:, :, :width]


def _normalise_(heads: Tensor, weights: AttentionWeights, config: ModelConfig) -> None:
    """Apply the norms of queries and keys, which come first in `heads` [T, num_heads + 2 * num_kv_heads, head_dim]."""
    sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
    ranks = weights.output.ranks
    for part, norm_weights in zip(torch.split(heads, sizes, dim=1), weights.norms, strict=False):
        source = part if config.qk_norm == "head" else part.flatten(1)
        if ranks is None or config.qk_norm == "head":
            normed = norm(source, norm_weights)
        else:
            normed = ranks.own(norm(ranks.gather(source), norm_weights))
        part.copy_(normed.view_as(part))


def _scores(queries: Tensor, keys: Tensor, mask: Tensor, config: ModelConfig) -> Tensor:
    """[B, n, width] by [B, L, width] to [B, n, L]."""
    scale, cap = config.attention_scale, config.attention_softcap
    if not cap:
        return torch.baddbmm(mask, queries, keys.mT, alpha=scale)
    return torch.bmm(queries, keys.mT).mul_(scale / cap).tanh_().mul_(cap).add_(mask)


def _sink_columns(sinks: Tensor, num_queries: int, scores: Tensor, num_kv_heads: int) -> Tensor:
    """Scores [B, rows, COLUMNS] of what is before all positions: the sink of each row's head, then nothing."""
    rows = sinks.view(num_kv_heads, 1, -1).expand(-1, num_queries, -1).flatten(1)
    rows = F.pad(rows, (0, scores.shape[1] - rows.shape[1])).repeat(len(scores) // num_kv_heads, 1)
    return F.pad(rows[..., None], (0, COLUMNS - 1), value=-torch.inf)
