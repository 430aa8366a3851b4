"""Losses over a large vocabulary that never hold all logits: cross-entropy, and distillation from a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ACCEPTANCE_TEMPERATURE = 0.8

# Rows whose logits are held at once.
_CHUNK_ROWS = {"cpu": 1 << 10, "cuda": 1 << 14}


def chunked_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of softmax(hidden @ head.T) at targets.

    Args:
        hidden: [num_tokens, hidden], in the dtype that the products are computed in.
        head: [vocab_size, hidden].
        targets: [num_tokens] int64.
    """
    # torch leaves Function.apply untyped.
    loss: Tensor = _Chunked.apply(hidden, head, _TokenTargets(targets))  # type: ignore[no-untyped-call]
    return loss


def chunked_distillation(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of softmax(hidden @ head.T) under the teacher's distribution.

    It is the Kullback-Leibler divergence of Hinton et al. 2015 at temperature 1, plus the teacher's own entropy.

    Args:
        hidden, head: as in `chunked_cross_entropy`.
        teacher_hidden: [num_tokens, teacher's hidden].
        teacher_head: [vocab_size, teacher's hidden].
    """
    targets = _TeacherTargets(teacher_hidden, teacher_head)
    loss: Tensor = _Chunked.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
    return loss


def chunked_acceptance_loss(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Mean of -log(a), where a is the chance that the teacher accepts a token from softmax(hidden @ head.T).

    a is the sum over the tokens of the lesser of both probabilities (Leviathan et al. 2022, corollary 3.6), here at
    the temperature ACCEPTANCE_TEMPERATURE.  A model that is too small to match its teacher learns all possible tokens
    from the divergence, and the likely ones from this loss.

    Args:
        hidden, head, teacher_hidden, teacher_head: as in `chunked_distillation`.
    """
    targets = _AcceptanceTargets(teacher_hidden, teacher_head)
    loss: Tensor = _Chunked.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
    return loss


class _TokenTargets:
    """The target of a row is one token."""

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets

    def loss_and_gradient(self, start: int, log_probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """For rows from `start` on: the summed loss, and its gradient to the logits (in place of the argument)."""
        picked = self._targets[start : start + len(log_probabilities), None]
        loss = -log_probabilities.gather(1, picked).sum()
        gradient = log_probabilities.exp_()
        gradient.scatter_add_(1, picked, gradient.new_full((1, 1), -1.0).expand_as(picked))
        return loss, gradient


class _TeacherTargets:
    """The target of a row is a teacher's distribution."""

    def __init__(self, hidden: Tensor, head: Tensor) -> None:
        self._hidden, self._head = hidden, head.to(hidden.dtype)

    def loss_and_gradient(self, start: int, log_probabilities: Tensor) -> tuple[Tensor, Tensor]:
        wanted = self._logits(start, log_probabilities).softmax(dim=-1)
        loss = -torch.linalg.vecdot(wanted, log_probabilities).sum()
        return loss, log_probabilities.exp_().sub_(wanted)

    def _logits(self, start: int, like: Tensor) -> Tensor:
        return (self._hidden[start : start + len(like)] @ self._head.T).to(like.dtype)


class _AcceptanceTargets(_TeacherTargets):
    """The target of a row is acceptance by a teacher."""

    def loss_and_gradient(self, start: int, log_probabilities: Tensor) -> tuple[Tensor, Tensor]:
        wanted = self._logits(start, log_probabilities).div_(ACCEPTANCE_TEMPERATURE).softmax(dim=-1)
        drafted = log_probabilities.div_(ACCEPTANCE_TEMPERATURE).softmax(dim=-1)
        chance = torch.minimum(wanted, drafted).sum(dim=-1, keepdim=True)
        lacking = drafted * (drafted < wanted)  # more of these would raise the chance
        gradient = drafted.mul_(lacking.sum(dim=-1, keepdim=True)).sub_(lacking).div_(ACCEPTANCE_TEMPERATURE * chance)
        return -chance.log().sum(), gradient


class _Chunked(torch.autograd.Function):
    """Both gradients are computed in the forward pass, chunk by chunk, while the chunk's logits exist."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: _TokenTargets | _TeacherTargets) -> Tensor:
        used = head.to(hidden.dtype)
        d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head)
        total, chunk_rows = head.new_zeros(()), _CHUNK_ROWS[hidden.device.type]
        for start in range(0, len(hidden), chunk_rows):
            rows = hidden[start : start + chunk_rows]
            logits = (rows @ used.T).to(head.dtype)
            log_probabilities = logits.sub_(logits.logsumexp(dim=-1, keepdim=True))
            loss, gradient = targets.loss_and_gradient(start, log_probabilities)
            total += loss
            d_logits = gradient.to(hidden.dtype)
            torch.mm(d_logits, used, out=d_hidden[start : start + chunk_rows])
            d_head += d_logits.T @ rows
        ctx.save_for_backward(d_hidden.div_(len(hidden)), d_head.div_(len(hidden)))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * gradients[0], d_head * gradients[0], None
