"""The model as data: a plain record of the architecture over numpy arrays, which any backend can execute.

Arrays are C-contiguous in their last two dimensions, may be read-only views of a mapped file, and hold float32,
float16, or the bits of bfloat16 as uint16 (numpy has no bfloat16; nothing else here is uint16).  A linear layer's
weight is [out, in], as in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

Array = NDArray[Any]
RopeScaling = Literal["none", "linear", "llama3", "factors"]
DType = Literal["float32", "bfloat16", "float16"]

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021): pair i of a head turns by position * theta ** (-2 i / head_dim).

    Attributes:
        scaling: "none"; "linear" divides every frequency by `factor` (Chen et al. 2023); "llama3" divides those with
            a wavelength above original_max_position_embeddings / low_freq_factor, keeps those below
            original_max_position_embeddings / high_freq_factor, and blends between; "factors" divides frequency i
            by factors[i], of which there are head_dim / 2 (GGUF files give the scaling in this form).
    """

    theta: float
    scaling: RopeScaling = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture of a decoder-only transformer.

    Attributes:
        architecture: the name in the checkpoint, such as "MixtralForCausalLM".
        intermediate_size: width of the feed-forward block, or of each expert.
        num_experts: 0 for a dense model.
        num_experts_per_tok: experts a token is routed to; 0 for a dense model.
        max_position_embeddings: the most tokens that a sequence may have.
        dtype: of the checkpoint's tensors, as the file states it.
        bos_token_id, eos_token_ids: None and empty where the file names none.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: DType
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention.

    Attributes:
        q_proj: [num_heads * head_dim, hidden_size].
        k_proj, v_proj: [num_kv_heads * head_dim, hidden_size].
        o_proj: [hidden_size, num_heads * head_dim].
    """

    q_proj: Array
    k_proj: Array
    v_proj: Array
    o_proj: Array


@dataclass(frozen=True, slots=True)
class FeedForward:
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)).

    Attributes:
        gate_proj, up_proj: [intermediate_size, hidden_size].
        down_proj: [hidden_size, intermediate_size].
    """

    gate_proj: Array
    up_proj: Array
    down_proj: Array


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts (Jiang et al. 2024): each token goes to the experts with the highest router scores.

    Attributes:
        router: [num_experts, hidden_size].
        experts: num_experts feed-forward blocks.
    """

    router: Array
    experts: tuple[FeedForward, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: x += attention(input_norm(x)); x += feed_forward(post_attention_norm(x)).

    Attributes:
        input_norm, post_attention_norm: [hidden_size], gains of the RMSNorms.
    """

    input_norm: Array
    attention: Attention
    post_attention_norm: Array
    feed_forward: FeedForward | Experts


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A loaded model.

    Attributes:
        embedding: [vocab_size, hidden_size].
        norm: [hidden_size], gain of the last RMSNorm.
        head: [vocab_size, hidden_size]; the embedding itself where they are tied.
    """

    config: ModelConfig
    embedding: Array
    layers: tuple[Layer, ...]
    norm: Array
    head: Array

    @property
    def num_parameters(self) -> int:
        """The number of weights; tied ones count once."""
        return sum(array.size for *_, array in self.tensors())

    def tensors(self) -> Iterator[tuple[str, int, int, Array]]:
        """All weights, tied ones once, as the head: the field's name, the layer, the expert and the array."""
        if self.head is not self.embedding:
            yield "embedding", 0, 0, self.embedding
        yield "head", 0, 0, self.head
        yield "norm", 0, 0, self.norm
        for index, layer in enumerate(self.layers):
            yield "input_norm", index, 0, layer.input_norm
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield name, index, 0, getattr(layer.attention, name)
            yield "post_attention_norm", index, 0, layer.post_attention_norm
            block = layer.feed_forward
            if isinstance(block, Experts):
                yield "router", index, 0, block.router
            for expert, weights in enumerate(block.experts if isinstance(block, Experts) else (block,)):
                for name in ("gate_proj", "up_proj", "down_proj"):
                    yield name, index, expert, getattr(weights, name)


def bytes_per_block(config: ModelConfig, dtype: str, block_size: int) -> int:
    """Bytes of KV cache that one block of `block_size` tokens takes, over all layers, with elements of `dtype`."""
    elements = 2 * config.num_layers * config.num_kv_heads * config.head_dim * block_size
    return elements * DTYPE_BYTES[dtype]
