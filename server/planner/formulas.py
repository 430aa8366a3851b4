"""What a transformer costs: plain functions of plain numbers, each with its source.

FLOPs count a multiplication and an addition as two.  A rank is one of the chips that share a model.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.model.architecture import KVLayout, MixtureConfig

# -- computing and reading ---------------------------------------------------------------------------------------------


def matrix_flops(num_weights: float, num_tokens: float) -> float:
    """Of multiplying each token with `num_weights` weights: 2 N a token (Kaplan et al. 2020, section 2.1)."""
    return 2 * num_weights * num_tokens


def num_pairs(layout: KVLayout, before: int, num_tokens: int) -> int:
    """Pairs of a query and a key that it sees, for the tokens at positions `before` and after.

    A query sees itself and what is before it, as far as its window or its chunk reaches.
    """
    return _pairs_up_to(layout, before + num_tokens) - _pairs_up_to(layout, before)


def _pairs_up_to(layout: KVLayout, length: int) -> int:
    if layout.chunk:
        return length // layout.chunk * _triangle(layout.chunk) + _triangle(length % layout.chunk)
    window = layout.window or length
    return _triangle(min(length, window)) + window * max(length - window, 0)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def attention_flops(layout: KVLayout, num_heads: int, pairs: float) -> float:
    """Of one layer's scores and sums: for each pair a product over a key, and one over a value, in each query head
    (Kaplan et al. 2020, table 1; keys and values as the cache holds them, DeepSeek-V2, 2024, for latent attention)."""
    return 2 * num_heads * (layout.key_width + layout.value_width) * pairs


def num_cached(layout: KVLayout, length: int) -> int:
    """Tokens that the query at the end of `length` tokens reads from the cache of one layer."""
    return num_pairs(layout, length - 1, 1)


def cache_elements(layouts: Sequence[KVLayout], length: int) -> int:
    """Numbers in the KV cache that the query at the end of `length` tokens reads: keys and values of each layer (Pope
    et al. 2022)."""
    return sum(layout.num_elements * num_cached(layout, length) for layout in layouts)


def touched_experts(mixture: MixtureConfig, num_tokens: float) -> float:
    """The share of experts that a step of `num_tokens` tokens reads, if the router chooses evenly.

    An expert is left out by all of them with a chance of (1 - k / n) ** tokens.
    """
    untouched: float = (1 - mixture.num_experts_per_tok / mixture.num_experts) ** num_tokens
    return 1 - untouched


def roofline_seconds(flops: float, num_bytes: float, flops_rate: float, bandwidth: float) -> float:
    """The least time of work that computes and reads at once (Williams et al. 2009)."""
    return max(flops / flops_rate, num_bytes / bandwidth)


def ridge(flops_rate: float, bandwidth: float) -> float:
    """The arithmetic intensity, in FLOPs a byte, from which on computing is the limit (Williams et al. 2009)."""
    return flops_rate / bandwidth


# -- speculation -------------------------------------------------------------------------------------------------------


def tokens_per_step(acceptance_rate: float, num_spec_tokens: int) -> float:
    """Tokens that a step with k drafted ones gives: 1 + a + ... + a^k (Leviathan et al. 2023, equation 1)."""
    return sum(acceptance_rate**place for place in range(num_spec_tokens + 1))


def least_acceptance(cost: float, num_spec_tokens: int) -> float | None:
    """The acceptance rate from which on speculation pays, if a step with drafted tokens costs `cost` plain steps and
    drafting costs nothing (Leviathan et al. 2023, theorem 3.8); None if it never does."""
    if cost > num_spec_tokens + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if tokens_per_step(middle, num_spec_tokens) >= cost else (middle, high)
    return high


# -- splitting: bytes on the wire of a forward pass --------------------------------------------------------------------


def all_reduce_bytes(message: float, ranks: int) -> float:
    """What each rank sends to add up a message of so many bytes over all of them: 2 (n - 1) / n of it, in a ring
    (Patarasuk and Yuan 2009; Rajbhandari et al. 2020, section 7.1)."""
    return 2 * (ranks - 1) / ranks * message


def all_gather_bytes(message: float, ranks: int) -> float:
    """What each rank sends to have a message of so many bytes whole on all of them, if each has its part: (n - 1) / n
    of it, in a ring (Thakur et al. 2005, section 4.1)."""
    return (ranks - 1) / ranks * message


def tensor_parallel_bytes(token_bytes: float, num_tokens: float, num_sums: int, ranks: int) -> float:
    """What each rank sends: an all-reduce of the hidden state (`token_bytes` a token) after attention and after the
    feed-forward block, which makes two of each layer (Shoeybi et al. 2019, section 3)."""
    return num_sums * all_reduce_bytes(token_bytes * num_tokens, ranks)


def expert_parallel_bytes(token_bytes: float, num_tokens: float, num_experts_per_tok: int, ranks: int) -> float:
    """What each rank sends in one layer: its share of the tokens to the ranks of their experts, and back (Lepikhin et
    al. 2020, GShard); (n - 1) / n of the experts are elsewhere."""
    return 2 * token_bytes * num_tokens / ranks * num_experts_per_tok * (ranks - 1) / ranks


def pipeline_bytes(token_bytes: float, num_tokens: float) -> float:
    """What a stage sends to the next one: the hidden states (GPipe, Huang et al. 2019)."""
    return token_bytes * num_tokens


# -- training ----------------------------------------------------------------------------------------------------------


def training_flops(num_active: float, num_tokens: float) -> float:
    """6 N a token: the forward pass, and twice that for the way back (Kaplan et al. 2020, section 2.1)."""
    return 3 * matrix_flops(num_active, num_tokens)


def training_state_bytes(num_parameters: float, shards: int = 1) -> dict[str, float]:
    """Of Adam in mixed precision: parameters and gradients of 2 bytes, and a float32 copy with two moments; a rank has
    its part of each under ZeRO stage 3, which is FSDP (Rajbhandari et al. 2020, sections 3 and 5)."""
    return {
        "parameters": 2 * num_parameters / shards,
        "gradients": 2 * num_parameters / shards,
        "optimizer": 12 * num_parameters / shards,
    }


def activation_bytes(num_tokens: int, length: int, hidden_size: int, num_heads: int, num_layers: int) -> float:
    """Kept for the way back, of layers with 16-bit numbers and a feed-forward block four times as wide as the hidden
    state: s b h (34 + 5 a s / h) a layer (Korthikanti et al. 2022, equation 1)."""
    return num_tokens * hidden_size * num_layers * (34 + 5 * num_heads * length / hidden_size)


def recomputed_activation_bytes(num_tokens: int, hidden_size: int, num_layers: int) -> float:
    """Kept if each layer is computed again from its input: 2 s b h a layer (Korthikanti et al. 2022, table 2)."""
    return 2 * num_tokens * hidden_size * num_layers


def fsdp_bytes(num_parameters: float, shards: int) -> float:
    """What each rank sends in a training step: its parameters gathered twice and the gradients scattered once, which
    is 1.5 times what plain data parallelism sends (Rajbhandari et al. 2020, section 7.2)."""
    return 3 * 2 * num_parameters * (shards - 1) / shards
