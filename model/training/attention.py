"""Causal attention for training: torch's own on a GPU, and a few large matrix products on a CPU.

On a CPU torch's fused kernel reaches a tenth of the speed of its matrix products at our head sizes.  Here the query
heads that share a KV head are rows of one product.  Queries are taken block by block, so that positions after a block
are not computed.  The backward pass is written out over the saved probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 128  # queries


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Grouped-query attention (Ainslie et al. 2023) in which a position sees itself and those before it.

    Args:
        queries: [batch, num_heads, length, head_dim].
        keys, values: [batch, num_kv_heads, length, head_dim]; query head h reads KV head h // (heads a KV head).

    Returns:
        [batch, num_heads, length, head_dim].
    """
    if queries.is_cuda:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    batch, num_heads, length, head_dim = queries.shape
    num_groups = batch * keys.shape[1]
    scaled = (queries * head_dim**-0.5).reshape(num_groups, -1, length, head_dim)
    flat = (tensor.reshape(num_groups, length, head_dim) for tensor in (keys, values))
    # torch leaves Function.apply untyped.
    mixed: Tensor = _CausalAttention.apply(scaled, *flat)  # type: ignore[no-untyped-call]
    return mixed.view(batch, num_heads, length, head_dim)


class _CausalAttention(torch.autograd.Function):
    """softmax(q k') v for queries [groups, heads, length, head_dim], keys and values [groups, length, head_dim]."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        groups, heads, length, _ = queries.shape
        output, saved = torch.empty_like(queries), []
        for start, end in _blocks(length):
            scores = _rows(queries, start, end) @ keys[:, :end].mT
            corner = scores.view(groups, heads, end - start, end)[..., start:]
            corner += torch.full_like(corner[0, 0], -math.inf).triu_(1)
            probabilities = scores.softmax(dim=-1)
            output[:, :, start:end] = (probabilities @ values[:, :end]).view(groups, heads, end - start, -1)
            saved.append(probabilities)
        ctx.save_for_backward(queries, keys, values, output, *saved)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values, output, *saved = ctx.saved_tensors
        d_output = gradients[0]
        # The softmax's backward pass needs each row's sum of p * dp, which is the sum of output * d_output.
        sums = (d_output * output).sum(dim=-1, keepdim=True)
        d_queries, d_keys, d_values = map(torch.zeros_like, (queries, keys, values))
        for (start, end), probabilities in zip(_blocks(queries.shape[2]), saved, strict=True):
            rows, d_rows = _rows(queries, start, end), _rows(d_output, start, end)
            d_values[:, :end] += probabilities.mT @ d_rows
            d_scores = (d_rows @ values[:, :end].mT).sub_(_rows(sums, start, end)).mul_(probabilities)
            d_queries[:, :, start:end] = (d_scores @ keys[:, :end]).view_as(queries[:, :, start:end])
            d_keys[:, :end] += d_scores.mT @ rows
        return d_queries, d_keys, d_values


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, _BLOCK):
        yield start, min(length, start + _BLOCK)


def _rows(tensor: Tensor, start: int, end: int) -> Tensor:
    """The positions [start, end) of all heads of a group as the rows of one matrix."""
    return tensor[:, :, start:end].flatten(1, 2)
