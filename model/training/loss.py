"""Cross-entropy of a large vocabulary without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_ROWS = 512


def chunked_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of softmax(hidden @ head.T) at targets.

    Args:
        hidden: [num_tokens, hidden].
        head: [vocab_size, hidden].
        targets: [num_tokens] int64.
    """
    # torch leaves Function.apply untyped.
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Both gradients are made in the forward pass, chunk by chunk, while the chunk's logits are at hand."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head)
        total = hidden.new_zeros(())
        chunks = (torch.split(tensor, _CHUNK_ROWS) for tensor in (hidden, targets, d_hidden))
        for rows, goals, d_rows in zip(*chunks, strict=True):
            logits = rows @ head.T
            log_probabilities = logits.log_softmax(dim=-1)
            picked = goals[:, None]
            total -= log_probabilities.gather(1, picked).sum()
            d_logits = log_probabilities.exp_()
            d_logits.scatter_add_(1, picked, d_logits.new_full((1, 1), -1.0).expand_as(picked))
            torch.mm(d_logits, head, out=d_rows)
            d_head.addmm_(d_logits.T, rows)
        ctx.save_for_backward(d_hidden.div_(len(hidden)), d_head.div_(len(hidden)))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * gradients[0], d_head * gradients[0], None
