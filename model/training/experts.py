"""Tokens through their experts, one pair of matrix products for each expert, with the backward pass by hand.

Sorting tokens by expert makes every expert's work contiguous.  The backward pass is written out because autograd
would keep, and then add up, a slice of every intermediate for every expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def route_through_experts(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The weighted sum of what each token's chosen experts make of it.

    Args:
        x: [num_tokens, hidden].
        weights: [num_tokens, k], how much each chosen expert counts.
        chosen: [num_tokens, k] int64, expert ids.
        gate_up: [num_experts, 2 * intermediate, hidden].
        down: [num_experts, hidden, intermediate].

    Returns:
        [num_tokens, hidden].
    """
    k = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=len(gate_up)).tolist()
    tokens = order // k
    # torch leaves Function.apply untyped.
    outputs = _SwigluExperts.apply(x[tokens], gate_up, down, counts)  # type: ignore[no-untyped-call]
    return torch.zeros_like(x).index_add(0, tokens, outputs * weights.flatten()[order, None])


class _SwigluExperts(torch.autograd.Function):
    """down(silu(gate) * up) for rows [num_rows, hidden] that are sorted by expert, `counts[e]` of them for expert e."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
        inner = rows.new_empty(len(rows), gate_up.shape[1])
        output = torch.empty_like(rows)
        parts = (torch.split(tensor, counts) for tensor in (rows, inner, output))
        for e, (x, part, y) in enumerate(zip(*parts, strict=True)):
            torch.mm(x, gate_up[e].T, out=part)
            gate, up = part.chunk(2, dim=-1)
            torch.mm(F.silu(gate) * up, down[e].T, out=y)
        ctx.save_for_backward(rows, gate_up, down, inner)
        ctx.counts = counts
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        rows, gate_up, down, inner = ctx.saved_tensors
        d_rows = torch.empty_like(rows)
        d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
        parts = (torch.split(tensor, ctx.counts) for tensor in (rows, inner, gradients[0], d_rows))
        for e, (x, part, d_y, d_x) in enumerate(zip(*parts, strict=True)):
            gate, up = part.chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            torch.mm(d_y.T, silu * up, out=d_down[e])
            d_product = d_y @ down[e]
            d_part = torch.empty_like(part)
            d_gate, d_up = d_part.chunk(2, dim=-1)
            torch.mul(d_product, silu, out=d_up)
            # silu' = sigmoid + silu * (1 - sigmoid)
            torch.mul(d_product * up, sigmoid + silu * (1 - sigmoid), out=d_gate)
            torch.mm(d_part.T, x, out=d_gate_up[e])
            torch.mm(d_part, gate_up[e], out=d_x)
        return d_rows, d_gate_up, d_down, None
