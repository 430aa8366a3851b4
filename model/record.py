"""The model as data: a plain record of its arrays, beside its architecture, which any backend can execute.

Arrays are C-contiguous in their last dimension, may be read-only views of a mapped file, and hold float32, float16,
the bits of bfloat16 as uint16 (numpy has no bfloat16; nothing else here is uint16), or quantised blocks, of which
`numbers.py` has the shape.  A linear layer's weight is [out, in], as in most checkpoints.  What a family does not have
is None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from shoal.model.architecture import ModelConfig
from shoal.model.numbers import Array, count_numbers, format_name


@dataclass(frozen=True, slots=True)
class Linear:
    """x @ weight.T + bias.

    Attributes:
        weight: [out, in].
        bias: [out].
    """

    weight: Array
    bias: Array | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm or LayerNorm; the architecture says which.

    Attributes:
        gain, bias: [width]; width is that of all heads together for norms of queries and keys.
    """

    gain: Array | None = None
    bias: Array | None = None


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention (Ainslie et al. 2023); with num_heads KV heads it is multi-head, with one multi-query.

    Attributes:
        q_proj: to num_heads * head_dim.
        k_proj, v_proj: to num_kv_heads * head_dim.
        o_proj: from num_heads * head_dim to hidden_size.
        q_norm, k_norm: of queries and keys.
        sinks: [num_heads], a logit for each head that takes a share of the softmax and adds nothing (GPT-OSS).
    """

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    sinks: Array | None = None


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention: see `LatentConfig`.

    Attributes:
        q_down, q_down_norm: from hidden_size to query_rank, and the RMSNorm of that; None if query_rank is 0.
        q_proj: from query_rank, or hidden_size, to num_heads * (nope_dim + rope_dim).
        kv_down: from hidden_size to rank + rope_dim; the last rope_dim elements are the key part with RoPE.
        kv_norm: RMSNorm of the latent, [rank].
        k_up: [num_heads, nope_dim, rank], from the latent to each head's key part without RoPE.
        v_up: [num_heads, value_dim, rank], from the latent to each head's value.
        o_proj: from num_heads * value_dim to hidden_size.
    """

    q_down: Linear | None
    q_down_norm: Norm | None
    q_proj: Linear
    kv_down: Linear
    kv_norm: Norm
    k_up: Array
    v_up: Array
    o_proj: Linear


@dataclass(frozen=True, slots=True)
class FeedForward:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) where there is no gate.

    Attributes:
        gate_proj, up_proj: from hidden_size to the block's width.
        down_proj: back.
    """

    gate_proj: Linear | None
    up_proj: Linear
    down_proj: Linear


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: see `MixtureConfig`.

    Attributes:
        router: from hidden_size to num_experts.
        correction: [num_experts], added to the scores for the choice of experts alone (DeepSeek-V3).
        experts: num_experts blocks.
        shared: the expert that every token goes to (DeepSeekMoE, Dai et al. 2024).
        shared_gate: to one number, whose sigmoid multiplies the shared expert's output (Qwen2-MoE).
    """

    router: Linear
    experts: tuple[FeedForward, ...]
    correction: Array | None = None
    shared: FeedForward | None = None
    shared_gate: Linear | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: x += output_norm(block(norm(x))), first with attention, then with the feed-forward block.

    A norm that a family does not have is None.  `ModelConfig` says what else there is: blocks in parallel, norms after
    the sums (which are then `attention_output_norm` and `feed_forward_output_norm`).
    """

    input_norm: Norm | None
    attention: Attention | LatentAttention
    feed_forward_norm: Norm | None
    feed_forward: FeedForward | Experts
    attention_output_norm: Norm | None = None
    feed_forward_output_norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A loaded model.

    Attributes:
        embedding: [vocab_size, hidden_size].
        head: to vocab_size; its weight is the embedding itself where they are tied.
        positions: [max_position_embeddings, hidden_size], added to the embedding: learned (GPT-2), or sines (XGLM).
        embedding_norm: of the embedding (BLOOM).
        norm: the last one.
    """

    config: ModelConfig
    embedding: Array
    layers: tuple[Layer, ...]
    norm: Norm | None
    head: Linear
    positions: Array | None = None
    embedding_norm: Norm | None = None

    @property
    def num_parameters(self) -> int:
        """The number of weights; tied ones count once."""
        return sum(count_numbers(array) for *_, array in self.tensors())

    @property
    def formats(self) -> list[str]:
        """The formats of the matrices, by the bytes that they take, most first."""
        sizes = Counter[str]()
        for *_, array in self.tensors():
            if array.ndim > 1:
                sizes[format_name(array)] += array.nbytes
        return [name for name, _ in sizes.most_common()]

    def tensors(self) -> Iterator[tuple[str, int, int, Array]]:
        """All arrays, tied ones once, as the head: the field's name, the layer, the expert and the array.

        A bias is named after its owner, such as "q_proj.bias".  The shared expert counts as the one after the last.
        """
        if self.head.weight is not self.embedding:
            yield "embedding", 0, 0, self.embedding
        for name in ("head", "positions", "embedding_norm", "norm"):
            yield from _arrays(name, 0, 0, getattr(self, name))
        for index, layer in enumerate(self.layers):
            for part in (layer, layer.attention, layer.feed_forward):
                for field in fields(part):
                    yield from _arrays(field.name, index, 0, getattr(part, field.name))
            if isinstance(layer.feed_forward, Experts):
                shared = layer.feed_forward.shared
                for expert, block in enumerate((*layer.feed_forward.experts, *([shared] if shared else []))):
                    for field in fields(block):
                        yield from _arrays(field.name, index, expert, getattr(block, field.name))


def _arrays(name: str, layer: int, expert: int, part: Any) -> Iterator[tuple[str, int, int, Array]]:
    """The arrays of a linear layer, of a norm, or the one array that the part is; of anything else none."""
    if isinstance(part, Linear):
        yield name, layer, expert, part.weight
    elif isinstance(part, Norm) and part.gain is not None:
        yield name, layer, expert, part.gain
    elif hasattr(part, "dtype"):
        yield name, layer, expert, part
    if isinstance(part, Linear | Norm) and part.bias is not None:
        yield f"{name}.bias", layer, expert, part.bias
