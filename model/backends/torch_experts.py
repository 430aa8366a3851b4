"""Mixtures of experts: which experts a token goes to, and one grouped product for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.model.architecture import MixtureConfig
from shoal.model.backends.split import experts_of
from shoal.model.backends.torch_activations import sigmoid
from shoal.model.backends.torch_layers import COLUMNS, ROWS, FeedForwardWeights, LinearWeights, feed_forward, linear
from shoal.model.backends.torch_ranks import Ranks, Spread

# Grouped products want rows of a multiple of 16 bytes.
_GROUPED = 8


class ExpertWeights(NamedTuple):
    """The weights of a mixture; `depth` is hidden and `width` is each expert's, both padded with zeros.

    Attributes:
        width, out: of each expert's hidden state and output, without the padding.
        spread: how experts are spread over ranks, of which this one has `num_experts`, or a part of the columns.
        correction: [num_experts] float32.
        up: [num_experts, 2 * width, depth], the gate's rows first, or [num_experts, width, depth] without a gate.
        down: [num_experts, depth, width].
        up_bias, down_bias: [num_experts, rows of `up` or `down`].
        rows: [num_experts] int64, to which the rows that each expert computes are added while somebody watches.
    """

    config: MixtureConfig
    router: LinearWeights
    correction: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    activate: Callable[[Tensor], Tensor]
    width: int
    out: int
    spread: Spread | None
    shared: FeedForwardWeights | None
    shared_gate: LinearWeights | None
    rows: Tensor | None = None


def mixture_of_experts(x: Tensor, weights: ExpertWeights) -> Tensor:
    """Add the outputs of each token's experts, weighted by the router's shares: [T, hidden] to [T, hidden]."""
    shares, experts = route(x, weights)
    if weights.rows is not None:
        weights.rows.add_(experts.flatten().bincount(minlength=len(weights.rows)))
    copies = x.repeat_interleave(experts.shape[1], dim=0)
    if weights.config.share_on_input:
        copies *= shares.view(-1, 1)
    spread, flat = weights.spread, experts.flatten()
    if spread and spread.whole_experts:
        outputs = _outputs_of_ranks(copies, flat, weights, spread.ranks)
    else:
        outputs = _outputs(copies, flat, weights)
    outputs = outputs.view(*experts.shape, -1)
    if not weights.config.share_on_input:
        outputs = outputs * shares
    total = outputs[:, 0]
    for place in range(1, outputs.shape[1]):
        total = total + outputs[:, place]
    if spread and not spread.whole_experts:
        total = spread.ranks.gather(total)
    return total if weights.shared is None else total + _shared_expert(x, weights)


def _outputs(copies: Tensor, experts: Tensor, weights: ExpertWeights) -> Tensor:
    """The outputs [n, hidden] of the experts [n] of each row of `copies` [n, hidden]; of spread columns this rank's.

    Rows are placed in a buffer, expert after expert, so that all experts run as one grouped product.
    """
    places, ends = place_by_expert(experts, weights.up.shape[0])
    num_rows = places.shape[0] + (ROWS - 1) * ends.shape[0]
    buffer = _placed(copies, places, num_rows, weights.up.shape[-1])
    buffer = weights.activate(_grouped_linear(buffer, weights.up, weights.up_bias, ends))
    if weights.spread and not weights.spread.whole_experts:
        activated = weights.spread.ranks.gather(buffer.index_select(0, places)[:, : weights.width])
        buffer = _placed(activated, places, num_rows, weights.down.shape[-1])
    return _grouped_linear(buffer, weights.down, weights.down_bias, ends).index_select(0, places)[:, : weights.out]


def _placed(rows: Tensor, places: Tensor, num_rows: int, width: int) -> Tensor:
    """A buffer [num_rows, width] of zeros but for the rows [n, at most width] at their places."""
    buffer = rows.new_zeros(num_rows, width)
    buffer[:, : rows.shape[1]].index_copy_(0, places, rows)
    return buffer


def _outputs_of_ranks(copies: Tensor, experts: Tensor, weights: ExpertWeights, ranks: Ranks) -> Tensor:
    """As `_outputs`, where each rank computes the rows of its own experts."""
    parts = [experts_of(member, ranks.size, weights.config.num_experts) for member in range(ranks.size)]
    rows = [((experts >= part.start) & (experts < part.stop)).nonzero()[:, 0] for part in parts]
    own = rows[ranks.index]
    outputs = copies.new_zeros(max(map(len, rows)), copies.shape[1])
    if len(own):
        outputs[: len(own)] = _outputs(copies[own], experts[own] - parts[ranks.index].start, weights)
    result = torch.empty_like(copies)
    for own, found in zip(rows, ranks.gather_rows(outputs), strict=True):
        result[own] = found[: len(own)]
    return result


def route(x: Tensor, weights: ExpertWeights) -> tuple[Tensor, Tensor]:
    """The shares [T, num_experts_per_tok, 1] and the indices [T, num_experts_per_tok] of each token's experts."""
    config = weights.config
    logits = linear(x, weights.router).float()
    is_plain = weights.correction is None and config.num_groups == 1
    over_chosen = config.score == "softmax" and config.renormalise
    if is_plain and over_chosen:
        # A softmax over all experts, renormalised over the chosen ones, is the softmax over these alone.
        chosen, experts = logits.topk(config.num_experts_per_tok, dim=-1)
        shares = chosen.softmax(dim=-1)
    else:
        scores = logits.softmax(dim=-1) if config.score == "softmax" else sigmoid(logits)
        # Scores rank experts as logits do, but round different logits to the same number.
        choice = logits if is_plain else _choice_scores(scores, weights)
        experts = choice.topk(config.num_experts_per_tok, dim=-1).indices
        shares = logits.gather(1, experts).softmax(dim=-1) if over_chosen else scores.gather(1, experts)
        if config.renormalise and not over_chosen:
            shares = shares / shares.sum(dim=-1, keepdim=True)
    return (shares * config.scale).to(x.dtype)[..., None], experts


def _choice_scores(scores: Tensor, weights: ExpertWeights) -> Tensor:
    """The scores [T, num_experts] that choose: corrected, and -inf for experts that are not in the best groups."""
    config = weights.config
    choice = scores if weights.correction is None else scores + weights.correction
    if config.num_groups == 1:
        return choice
    groups = choice.view(len(choice), config.num_groups, -1)
    group_scores = groups.topk(1 if config.group_score == "max" else 2, dim=-1).values.sum(dim=-1)
    best = group_scores.topk(config.num_chosen_groups, dim=-1).indices
    hidden = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, value=False)
    return groups.masked_fill(hidden[..., None], -torch.inf).flatten(1)


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


def _grouped_linear(buffer: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """Each expert's rows times its weights [num_experts, out, in], plus its bias [num_experts, out]."""
    result = F.grouped_mm(buffer, weight.mT, offs=ends)
    if bias is None:
        return result
    experts = torch.bucketize(torch.arange(len(buffer), device=ends.device), ends, right=True)
    return result + bias.index_select(0, experts.clamp_(max=len(bias) - 1))


def _shared_expert(x: Tensor, weights: ExpertWeights) -> Tensor:
    """The output of the expert that every token goes to, [T, hidden]."""
    assert weights.shared is not None
    output = feed_forward(x, weights.shared)
    if weights.shared_gate is None:
        return output
    return output * sigmoid(linear(x, weights.shared_gate).float()).to(x.dtype)


def grouped_width(size: int) -> int:
    """`size` padded as grouped products need it: a multiple of _GROUPED, and at least COLUMNS."""
    return max(COLUMNS, -(-size // _GROUPED) * _GROUPED)
