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
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from shoal.model.architecture import NormKind
from shoal.model.backends.torch_ranks import Ranks

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

ROWS = 4  # every product has a multiple of this number of rows
COLUMNS = 32  # and at least this number of columns


class LinearWeights(NamedTuple):
    """weight: [out, in]; bias: [out]; ranks: those over which the columns of inputs and outputs are spread."""

    weight: Tensor
    bias: Tensor | None = None
    ranks: Ranks | None = None


class NormWeights(NamedTuple):
    """gain, bias: [width], or [num_heads, width] for norms of heads."""

    kind: NormKind
    eps: float
    gain: Tensor | None = None
    bias: Tensor | None = None


class FeedForwardWeights(NamedTuple):
    """up: [2 * width, hidden], the gate's rows first, or [width, hidden] without a gate; down: [hidden, width]."""

    up: LinearWeights
    down: LinearWeights
    activate: Callable[[Tensor], Tensor]


def pad_rows(x: Tensor, multiple: int = ROWS) -> Tensor:
    """[..., n, width] with rows of zeros added, up to a multiple of `multiple`."""
    missing = -x.shape[-2] % multiple
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def linear(x: Tensor, weights: LinearWeights) -> Tensor:
    """x @ weight.T + bias: [n, in] to [n, out]; of columns that are spread, x is this rank's part."""
    weight, bias, ranks = weights
    num_columns = weight.shape[0]  # Tensor.__len__ is slow
    columns = weight if num_columns >= COLUMNS else pad_rows(weight, COLUMNS)
    x = x if ranks is None else ranks.gather(x)
    result = F.linear(pad_rows(x), columns)[: x.shape[0], :num_columns]
    result = result if bias is None else result.add_(bias)
    return result if ranks is None else ranks.gather(result)


def norm(x: Tensor, weights: NormWeights | None) -> Tensor:
    """RMSNorm or LayerNorm over the last dimension; `x` itself where a family has no norm."""
    if weights is None:
        return x
    kind, eps, gain, bias = weights
    width = x.shape[-1:]
    x = F.rms_norm(x, width, eps=eps) if kind == "rms" else F.layer_norm(x, width, eps=eps)
    x = x if gain is None else x.mul_(gain)
    return x if bias is None else x.add_(bias)


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn the first `dim` elements of `heads` [T, num_heads, head_dim] in place by the angles of their positions.

    RoPE, Su et al. 2021.

    Args:
        cos, sin: [T, 1, 2, dim / 2]; sin is negated at [:, :, 0], for the first half.
    """
    halves = heads[..., : 2 * cos.shape[-1]].view(*heads.shape[:-1], 2, -1)
    swapped = halves.flip(-2)
    halves.mul_(cos).addcmul_(swapped, sin)


def feed_forward(x: Tensor, weights: FeedForwardWeights) -> Tensor:
    """[T, hidden] to [T, hidden]."""
    return linear(weights.activate(linear(x, weights.up)), weights.down)
