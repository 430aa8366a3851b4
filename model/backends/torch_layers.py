"""The layers of the model as functions of tensors; T is the number of tokens in the step.

Weights that are applied to the same input are stacked into one matrix, because the time of a small model depends on
the number of operations.

A row's result must not depend on the rows beside it.  MKL rounds a row of a product in the same way under three
conditions.  The number of rows is a multiple of 4.  The product has at least 24 columns: for fewer, MKL chooses between
kernels by the number of rows (under 8 columns on Intel's processors; under 24 on AMD's, with two threads or more).  On
Intel's processors MKL is told to be strict, before its first product.  So every product here is padded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

ROWS = 4  # every product has a multiple of this number of rows
COLUMNS = 32  # and at least this number of columns


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
    """One layer.

    Attributes:
        input_norm, post_attention_norm: [hidden], the norms' gains.
        qkv: [(num_heads + 2 * num_kv_heads) * head_dim, hidden], the projections before attention.
        output: [hidden, num_heads * head_dim], the projection after it.
    """

    input_norm: Tensor
    qkv: Tensor
    output: Tensor
    post_attention_norm: Tensor
    feed_forward: FeedForwardWeights | ExpertWeights


def pad_rows(x: Tensor, multiple: int = ROWS) -> Tensor:
    """[..., n, width] with rows of zeros added, up to a multiple of `multiple`."""
    missing = -x.shape[-2] % multiple
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T: [n, in] and [out, in] to [n, out]."""
    if len(weight) < COLUMNS:
        return F.linear(pad_rows(x), pad_rows(weight, COLUMNS))[: len(x), : len(weight)]
    return F.linear(pad_rows(x), weight)[: len(x)]


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / rms(x) * gain over the last dimension (Zhang and Sennrich 2019)."""
    return F.rms_norm(x, gain.shape, gain, eps)


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn `heads` [T, num_heads, head_dim] in place by the angles of their positions (RoPE, Su et al. 2021).

    Args:
        cos, sin: [T, 1, 2, head_dim / 2]; sin is negated at [:, :, 0], for a head's first half.
    """
    halves = heads.view(*heads.shape[:-1], 2, -1)
    swapped = halves.flip(-2)
    halves.mul_(cos).addcmul_(swapped, sin)


def feed_forward(x: Tensor, weights: FeedForwardWeights | ExpertWeights) -> Tensor:
    """[T, hidden] to [T, hidden]."""
    if isinstance(weights, ExpertWeights):
        return mixture_of_experts(x, weights)
    return linear(swiglu(linear(x, weights.gate_up)), weights.down)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020): [T, 2 * width] to [T, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def mixture_of_experts(x: Tensor, weights: ExpertWeights) -> Tensor:
    """Add the outputs of each token's experts, weighted by the router's shares: [T, hidden] to [T, hidden].

    Tokens are placed in a buffer, expert after expert, so that all experts run as one grouped product.
    """
    shares, experts = route(x, weights)
    places, ends = place_by_expert(experts.flatten(), len(weights.router))
    copies = x.repeat_interleave(weights.num_experts_per_tok, dim=0)
    buffer = x.new_zeros(len(copies) + (ROWS - 1) * len(ends), x.shape[1]).index_copy_(0, places, copies)
    buffer = swiglu(F.grouped_mm(buffer, weights.gate_up.mT, offs=ends))
    buffer = F.grouped_mm(buffer, weights.down.mT, offs=ends)
    outputs = buffer.index_select(0, places).view(*shares.shape, -1)
    return outputs.mul_(shares[..., None]).sum(dim=1)


def route(x: Tensor, weights: ExpertWeights) -> tuple[Tensor, Tensor]:
    """The shares and the indices of each token's experts, both [T, num_experts_per_tok].

    A softmax over all experts, renormalised over the chosen ones, is the softmax over these alone.
    """
    scores, experts = linear(x, weights.router).float().topk(weights.num_experts_per_tok, dim=-1)
    return scores.softmax(dim=-1).to(x.dtype), experts


def place_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Where each row goes if rows are grouped by expert; each expert's part of the buffer is a multiple of ROWS.

    Args:
        experts: [n], the expert of each row.

    Returns:
        The places [n], and where each expert's part ends [num_experts] int32.
    """
    sent = experts[:, None] == torch.arange(num_experts, device=experts.device)
    so_far = sent.cumsum(dim=0)
    sizes = (so_far[-1] + (ROWS - 1)) & -ROWS
    ends = sizes.cumsum(dim=0)
    places = (so_far + (ends - sizes - 1)).gather(1, experts[:, None])[:, 0]
    return places, ends.to(torch.int32)
