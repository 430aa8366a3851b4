"""A mixture of experts as one pair of matrix products for each expert, with the backward pass by hand.

Sorting tokens by expert makes every expert's work contiguous.  The backward pass is written out because autograd
would keep, and then add up, a slice of every intermediate for every expert, and would scatter where a gather will do.
On a GPU, where launches would take longer than the products, all experts are one grouped product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def route_through_experts(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The weighted sum of the outputs of each token's chosen experts.

    Args:
        x: [num_tokens, hidden], in the dtype that the products are computed in.
        weights: [num_tokens, k], of the chosen experts.
        chosen: [num_tokens, k] int64, expert ids.
        gate_up: [num_experts, 2 * intermediate, hidden].
        down: [num_experts, hidden, intermediate].

    Returns:
        [num_tokens, hidden], in x's dtype.
    """
    if x.is_cuda:
        return _grouped(x, weights, chosen, gate_up, down)
    # torch leaves Function.apply untyped.
    mixed: Tensor = _Experts.apply(x, weights, chosen, gate_up, down)  # type: ignore[no-untyped-call]
    return mixed


def _grouped(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`route_through_experts` with grouped products, whose bounds stay on the GPU."""
    order, places = _sorted_by_expert(chosen)
    ends = count_by_expert(chosen, len(gate_up)).cumsum(0).to(torch.int32)
    rows = _permute(x.repeat_interleave(chosen.shape[1], dim=0), order, places)
    gate, up = F.grouped_mm(rows, gate_up.to(x.dtype).mT, offs=ends).chunk(2, dim=-1)
    output = F.grouped_mm(F.silu(gate) * up, down.to(x.dtype).mT, offs=ends)
    choices = _permute(output, places, order).view(*chosen.shape, -1)
    return (choices * weights.to(x.dtype)[..., None]).sum(dim=1)


def count_by_expert(chosen: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen, [num_experts] int64; it does not wait for a GPU."""
    return (chosen.flatten() == torch.arange(num_experts, device=chosen.device)[:, None]).sum(dim=1)


def _permute(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """`rows[order]`, whose backward pass is a gather too because the inverse order is known."""
    permuted: Tensor = _Permutation.apply(rows, order, inverse)  # type: ignore[no-untyped-call]
    return permuted


class _Permutation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        rows, order, inverse = inputs
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse), None, None


def _sorted_by_expert(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The choices [num_tokens, k] in the order of their experts, and each choice's place in that order."""
    order = chosen.flatten().argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return order, places


class _Experts(torch.autograd.Function):
    """`route_through_experts`, expert by expert; weights are cast to x's dtype."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        x, weights, chosen, gate_up, down = inputs
        order, places = _sorted_by_expert(chosen)
        counts = torch.bincount(chosen.flatten(), minlength=len(gate_up)).tolist()
        rows = x[order // chosen.shape[1]]
        gate_up_used, down_used = gate_up.to(x.dtype), down.to(x.dtype)
        inner, output = rows.new_empty(len(rows), gate_up.shape[1]), torch.empty_like(rows)
        parts = (torch.split(tensor, counts) for tensor in (rows, inner, output))
        for e, (row, part, y) in enumerate(zip(*parts, strict=True)):
            torch.mm(row, gate_up_used[e].T, out=part)
            gate, up = part.chunk(2, dim=-1)
            torch.mm(F.silu(gate) * up, down_used[e].T, out=y)
        choices = output[places].view(*chosen.shape, -1)
        ctx.save_for_backward(rows, weights, gate_up_used, down_used, inner, choices, order, places)
        ctx.counts, ctx.dtype = counts, gate_up.dtype
        return torch.bmm(weights.to(x.dtype).unsqueeze(1), choices).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        rows, weights, gate_up, down, inner, choices, order, places = ctx.saved_tensors
        d_mixed, k = gradients[0], weights.shape[1]
        d_weights = torch.bmm(choices, d_mixed.unsqueeze(-1)).squeeze(-1).to(weights.dtype)
        d_output = d_mixed[order // k] * weights.to(d_mixed.dtype).flatten()[order, None]
        d_rows = torch.empty_like(rows)
        d_gate_up, d_down = (torch.empty_like(tensor, dtype=ctx.dtype) for tensor in (gate_up, down))
        parts = (torch.split(tensor, ctx.counts) for tensor in (rows, inner, d_output, d_rows))
        for e, (row, part, d_y, d_row) in enumerate(zip(*parts, strict=True)):
            gate, up = part.chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            d_down[e] = d_y.T @ (silu * up)
            d_product = d_y @ down[e]
            d_part = torch.empty_like(part)
            d_gate, d_up = d_part.chunk(2, dim=-1)
            torch.mul(d_product, silu, out=d_up)
            # silu' = sigmoid + silu * (1 - sigmoid)
            torch.mul(d_product.mul_(up), sigmoid + silu * (1 - sigmoid), out=d_gate)
            d_gate_up[e] = d_part.T @ row
            torch.mm(d_part, gate_up[e], out=d_row)
        return d_rows[places].view(*weights.shape, -1).sum(dim=1), d_weights, None, d_gate_up, d_down
