"""The layers of the model as functions of tensors; T is the number of tokens in the step.

Weights that are applied to the same input are stacked into one matrix, because on a small model the number of
operations is what costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """qkv: [(num_heads + 2 * num_kv_heads) * head_dim, hidden]; output: [hidden, num_heads * head_dim]."""

    qkv: Tensor
    output: Tensor


@dataclass(frozen=True, slots=True)
class FeedForwardWeights:
    """gate_up: [2 * width, hidden]; down: [hidden, width]."""

    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """router: [num_experts, hidden]; gate_up: [num_experts, 2 * width, hidden]; down: [num_experts, hidden, width]."""

    router: Tensor
    gate_up: Tensor
    down: Tensor
    num_experts_per_tok: int


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; the norms' gains are [hidden]."""

    input_norm: Tensor
    attention: AttentionWeights
    post_attention_norm: Tensor
    feed_forward: FeedForwardWeights | ExpertWeights


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / rms(x) * gain over the last dimension (Zhang and Sennrich 2019)."""
    return F.rms_norm(x, gain.shape, gain, eps)


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn `heads` [T, num_heads, head_dim] in place by the angles of their positions (RoPE, Su et al. 2021).

    Args:
        cos, sin: [T, 1, 2, head_dim / 2]; the half of sin that meets a head's first half is negative.
    """
    halves = heads.view(*heads.shape[:-1], 2, -1)
    swapped = halves.flip(-2)
    halves.mul_(cos).addcmul_(swapped, sin)


def feed_forward(x: Tensor, weights: FeedForwardWeights | ExpertWeights) -> Tensor:
    """[T, hidden] to [T, hidden]."""
    if isinstance(weights, ExpertWeights):
        return mixture_of_experts(x, weights)
    return F.linear(swiglu(F.linear(x, weights.gate_up)), weights.down)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020): [T, 2 * width] to [T, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def mixture_of_experts(x: Tensor, weights: ExpertWeights) -> Tensor:
    """Send each token through its experts and add their outputs by the router's shares: [T, hidden] to [T, hidden].

    Tokens are sorted by expert, so that all experts run as one grouped product.
    """
    k = weights.num_experts_per_tok
    shares, experts = route(x, weights)
    order = experts.flatten().argsort(stable=True)
    ends = experts.flatten().bincount(minlength=len(weights.router)).cumsum(0, dtype=torch.int32)
    sorted_x = x.index_select(0, order // k)
    hidden = swiglu(F.grouped_mm(sorted_x, weights.gate_up.mT, offs=ends))
    sorted_y = F.grouped_mm(hidden, weights.down.mT, offs=ends)
    y = torch.empty_like(sorted_y).index_copy_(0, order, sorted_y)
    return torch.bmm(shares[:, None], y.view(len(x), k, -1))[:, 0]


def route(x: Tensor, weights: ExpertWeights) -> tuple[Tensor, Tensor]:
    """The share and the number of each token's experts, both [T, num_experts_per_tok].

    A softmax over all experts, renormalised over the best, is the softmax over the best alone.
    """
    scores, experts = F.linear(x, weights.router).float().topk(weights.num_experts_per_tok, dim=-1)
    return scores.softmax(dim=-1).to(x.dtype), experts
