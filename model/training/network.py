"""The network that is trained: a RoPE/GQA transformer with experts (Mixtral) or without (Llama), in plain torch.

Parameter shapes follow the exported checkpoint, but an expert layer keeps its experts stacked, gate and up together.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import causal_attention
from .experts import count_by_expert, route_through_experts
from .loss import chunked_acceptance_loss, chunked_cross_entropy, chunked_distillation
from .recipe import NetworkConfig


def training_dtype(device: torch.device) -> torch.dtype:
    """The dtype of matrix products: bfloat16 if the processor has instructions for it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32


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
    """Causal grouped-query attention with rotary positions.

    Attributes:
        qkv_proj: the query, key and value projections, one below the other.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv_proj = nn.Linear(config.hidden_size, heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """[batch, length, hidden] to the same."""
        heads = _project(x, self.qkv_proj).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        turned = rotate(heads[:, : -self.num_kv_heads], table)
        queries, keys = torch.split(turned, [self.num_heads, self.num_kv_heads], dim=1)
        mixed = causal_attention(queries, keys, heads[:, -self.num_kv_heads :])
        return _project(mixed.transpose(1, 2).flatten(2), self.o_proj)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[batch, length, hidden] to the same, computed in `dtype`, and a balance loss of zero."""
        used = x.to(dtype)
        inner = F.silu(_project(used, self.gate_proj)) * _project(used, self.up_proj)
        return _project(inner, self.down_proj), x.new_zeros(())


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

    def forward(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[batch, length, hidden] to the same, computed in `dtype`, and the load-balancing loss of the layer."""
        flat = x.flatten(0, 1)
        probabilities = self.router(flat).softmax(dim=-1)  # in float32: its order decides which experts compute
        weights, chosen = probabilities.topk(self.num_experts_per_tok, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        mixed = route_through_experts(flat.to(dtype), weights, chosen, self.gate_up, self.down)
        return mixed.view_as(x), self._balance_loss(probabilities, chosen)

    def _balance_loss(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        """Fedus et al. 2021 (Switch): 1 when all experts get the same share of tokens, more when they do not."""
        counts = count_by_expert(chosen, self.num_experts)
        return self.num_experts * (counts / chosen.numel() * probabilities.mean(dim=0)).sum()


def _project(x: Tensor, linear: nn.Linear) -> Tensor:
    """`linear` in the dtype of x."""
    return F.linear(x, linear.weight.to(x.dtype))


class Layer(nn.Module):
    """Attention, then experts or a feed-forward network, each after its norm and added to the residual stream."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config)
        self.post_attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Experts(config) if config.num_experts else FeedForward(config)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The stream [batch, length, hidden] after the layer, and its balance loss; products in the table's dtype."""
        dtype = table[0].dtype
        x = x + self.attention(self.input_norm(x).to(dtype), table)
        update, balance = self.mlp(self.post_attention_norm(x), dtype)
        return x + update, balance


class Network(nn.Module):
    """The whole model; the head is the embedding unless the recipe unties them.

    Attributes:
        dtype: of matrix products.  Weights, the residual stream, norms, routers and losses are float32.
    """

    def __init__(self, config: NetworkConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """[vocab_size, hidden]."""
        return self.embedding.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def initialize(self, seed: int) -> None:
        """Draw all matrices from N(0, 0.02); those that write to the stream have 0.02 / sqrt(2 * num_layers)."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                writes = name.endswith(("o_proj.weight", "down", "down_proj.weight"))
                deviation = 0.02 / math.sqrt(2 * self.config.num_layers) if writes else 0.02
                nn.init.normal_(parameter, std=deviation, generator=generator)

    def hidden_states(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """For token_ids [batch, length]: the normed stream [batch, length, hidden] in `dtype`, and the balance loss."""
        return self._run(self.embedding(token_ids))

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `hidden_states` returns, of what the first layer reads: x [batch, length, hidden]."""
        cos, sin = rotary_table(self.config, x.shape[1], x.device)
        table = cos.to(self.dtype), sin.to(self.dtype)
        balances = []
        for layer in self.layers:
            x, balance = layer(x, table)
            balances.append(balance)
        return self.norm(x).to(self.dtype), torch.stack(balances).mean()

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits [batch, length, vocab_size]."""
        return F.linear(self.hidden_states(token_ids)[0], self.head.to(self.dtype))

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of targets [batch, length] after inputs of that shape, in nats, and the balance loss."""
        hidden, balance = self.hidden_states(inputs)
        return chunked_cross_entropy(hidden.flatten(0, 1), self.head, targets.flatten()), balance

    def distillation_loss(self, inputs: Tensor, teacher: Network, *, by_acceptance: bool) -> tuple[Tensor, Tensor]:
        """The loss against a teacher after inputs [batch, length], in nats a token, and the balance loss.

        It is the mean cross-entropy under the teacher's distribution, or -log of the chance that it accepts a token.
        """
        with torch.no_grad():
            teacher_hidden, _ = teacher.hidden_states(inputs)
        hidden, balance = self.hidden_states(inputs)
        flat = hidden.flatten(0, 1), self.head, teacher_hidden.flatten(0, 1), teacher.head.detach()
        return (chunked_acceptance_loss if by_acceptance else chunked_distillation)(*flat), balance


def count_parameters(config: NetworkConfig) -> int:
    """All parameters of a network."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Network(config).parameters())


def count_active_parameters(config: NetworkConfig) -> int:
    """The parameters that a token is multiplied with: without experts that are not chosen and looked-up rows."""
    idle = max(0, config.num_experts - config.num_experts_per_tok)
    unused = config.num_layers * idle * 3 * config.hidden_size * config.intermediate_size
    if not config.tie_word_embeddings:
        unused += config.vocab_size * config.hidden_size
    return count_parameters(config) - unused
