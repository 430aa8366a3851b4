"""The network that is trained: a RoPE/GQA transformer with experts (Mixtral) or without (Llama), in plain torch.

Parameter shapes follow the exported checkpoint, but an expert layer keeps its experts stacked, gate and up together.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .experts import route_through_experts
from .loss import chunked_cross_entropy
from .recipe import NetworkConfig


def rotary_table(config: NetworkConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE (Su et al. 2021), each [length, head_dim], float32, halves repeated."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, config.rope_theta**-exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys [batch, heads, length, head_dim] by their positions; pairs are (i, i + head_dim / 2)."""
    cos, sin = table
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """[batch, length, hidden] to the same."""
        queries, keys, values = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(
            rotate(queries, table), rotate(keys, table), values, is_causal=True, enable_gqa=True
        )
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, length, hidden] to the same, and a balance loss of nothing."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), x.new_zeros(())


class Experts(nn.Module):
    """SwiGLU experts behind a top-k router whose softmax is over the chosen ones (Jiang et al. 2024, Mixtral).

    Attributes:
        gate_up: [num_experts, 2 * intermediate, hidden], the gate's rows first.
        down: [num_experts, hidden, intermediate].
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.num_experts, self.num_experts_per_tok = config.num_experts, config.num_experts_per_tok
        hidden, inner = config.hidden_size, config.intermediate_size
        self.router = nn.Linear(hidden, config.num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(config.num_experts, 2 * inner, hidden))
        self.down = nn.Parameter(torch.empty(config.num_experts, hidden, inner))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, length, hidden] to the same, and the load-balancing loss of the layer."""
        flat = x.flatten(0, 1)
        probabilities = self.router(flat).softmax(dim=-1)
        weights, chosen = probabilities.topk(self.num_experts_per_tok, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        mixed = route_through_experts(flat, weights, chosen, self.gate_up, self.down)
        return mixed.view_as(x), self._balance_loss(probabilities, chosen)

    def _balance_loss(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        """Fedus et al. 2021 (Switch): 1 when all experts get the same share of tokens, more when they do not."""
        counts = torch.bincount(chosen.flatten(), minlength=self.num_experts)
        return self.num_experts * (counts / chosen.numel() * probabilities.mean(dim=0)).sum()


class Layer(nn.Module):
    """Attention, then experts or a feed-forward network, each behind its norm and added to the stream."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config)
        self.post_attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Experts(config) if config.num_experts else FeedForward(config)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.input_norm(x), table)
        update, balance = self.mlp(self.post_attention_norm(x))
        return x + update, balance


class Network(nn.Module):
    """The whole model; the head is the embedding."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def initialize(self, seed: int) -> None:
        """Draw all matrices from N(0, 0.02), those that write to the stream narrower by sqrt(2 * num_layers)."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                writes = name.endswith(("o_proj.weight", "down", "down_proj.weight"))
                deviation = 0.02 / math.sqrt(2 * self.config.num_layers) if writes else 0.02
                nn.init.normal_(parameter, std=deviation, generator=generator)

    def hidden_states(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """For token_ids [batch, length]: the normed stream [batch, length, hidden], and the mean balance loss."""
        table = rotary_table(self.config, token_ids.shape[1], token_ids.device)
        x = self.embedding(token_ids)
        balances = []
        for layer in self.layers:
            x, balance = layer(x, table)
            balances.append(balance)
        return self.norm(x), torch.stack(balances).mean()

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits [batch, length, vocab_size]."""
        return F.linear(self.hidden_states(token_ids)[0], self.embedding.weight)

    def loss(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """For windows [batch, length + 1] of int64: mean cross-entropy in nats a token, and the mean balance loss."""
        hidden, balance = self.hidden_states(windows[:, :-1])
        return chunked_cross_entropy(hidden.flatten(0, 1), self.embedding.weight, windows[:, 1:].flatten()), balance
