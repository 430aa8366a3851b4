"""The activations of feed-forward blocks.

Torch's own sigmoid, silu and gelu round elements that do not fill a vector unlike others, so that bits depend on where
a thread's part of a tensor ends.  Its exp, tanh and erf do not, and activations are made of these, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from shoal.model.architecture import Activation

# Of GPT-OSS.
_LIMIT = 7.0
_STEEPNESS = 1.702


def activation(kind: Activation, *, gated: bool) -> Callable[[Tensor], Tensor]:
    """A function of [..., 2 * width], the gate first, that gives activation(gate) * up; of one without a gate."""

    def activate_gated(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        if kind == "clamped_silu":
            gate, up = gate.clamp(max=_LIMIT), up.clamp(-_LIMIT, _LIMIT) + 1
        return activate(gate).mul_(up)

    def activate(x: Tensor) -> Tensor:
        return function(x) if x.dtype == torch.float32 else function(x.float()).to(x.dtype)

    function = _FUNCTIONS[kind]
    return activate_gated if gated else activate


def sigmoid(x: Tensor) -> Tensor:
    return x.neg().exp_().add_(1).reciprocal_()


def _silu(x: Tensor) -> Tensor:
    return x / x.neg().exp_().add_(1)


def _clamped_silu(x: Tensor) -> Tensor:
    return x * sigmoid(x * _STEEPNESS)


def _gelu(x: Tensor) -> Tensor:
    return (x * math.sqrt(1 / 2)).erf_().add_(1).mul_(x).mul_(0.5)


def _gelu_tanh(x: Tensor) -> Tensor:
    inner = (x * x * x).mul_(0.044715).add_(x)
    return inner.mul_(math.sqrt(2 / math.pi)).tanh_().add_(1).mul_(x).mul_(0.5)


def _relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def _relu2(x: Tensor) -> Tensor:
    return _relu(x).square_()


_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": _silu,
    "clamped_silu": _clamped_silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": _relu2,
}
