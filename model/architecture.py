"""What a model's architecture is: a plain record of fields, the same for every family.

A family is a choice of these fields and not a class.  All that goes beyond Llama is absent by default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

DType = Literal["float32", "bfloat16", "float16"]
NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_silu"]
RouterScore = Literal["softmax", "sigmoid"]

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}

# Places of a layer's group that may stay empty, so that groups of unlike size have the same number of places.
_WASTE = 1 / 8


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021): pair i turns by position * theta ** (-2 i / dim) / factors[i].

    Element i of the rotated part turns with element i + dim / 2; loaders bring other orders into this one.

    Attributes:
        dim: elements of a head that turn: its first ones, or the last ones of a head of latent attention.
        scaling: the rule by which the checkpoint scales frequencies, for people; `factors` holds its result.
        factors: dim / 2 divisors; empty where nothing is scaled.
        attention_factor: multiplies cos and sin (YaRN, Peng et al. 2023; LongRoPE, Ding et al. 2024).
        short_factors, short_length: the divisors if no sequence is longer than `short_length` tokens (LongRoPE).
    """

    theta: float
    dim: int
    scaling: str = "default"
    factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    short_length: int = 0

    def within(self, max_model_len: int) -> RopeConfig:
        """The embedding for sequences of at most `max_model_len` tokens."""
        return replace(self, factors=self.short_factors) if max_model_len <= self.short_length else self


@dataclass(frozen=True, slots=True)
class Temperature:
    """A factor on the queries that grows with their position: 1 + scale * log(1 + floor((position + offset) / length)).

    Of Llama 4 (offset 1; layers without RoPE) and Ministral 3 (offset 0).
    """

    scale: float
    length: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, 2024): a token leaves one latent in the cache for all heads.

    A head's query and key have `nope_dim` elements without positions, then `rope_dim` elements with RoPE.

    Attributes:
        rank: width of the latent, of which keys and values are made.
        query_rank: width of the latent of queries; 0 where queries are made of the hidden state at once.
        norm_eps: of the norms of both latents, which is apart from that of other norms.
    """

    rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    query_rank: int = 0
    norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class MixtureConfig:
    """A mixture of experts (Shazeer et al. 2017; Jiang et al. 2024).

    Attributes:
        intermediate_size: width of each expert.
        score: of each expert, made of the router's logits.
        renormalise: whether the shares of the chosen experts are divided by their sum.
        scale: multiplies the shares after that.
        num_groups, num_chosen_groups: experts stand in groups of equal size, and only those of the best groups can be
            chosen (DeepSeek-V2); 1 and 1 where there are none.
        group_score: a group's score is that of its best expert, or the sum of its two best (DeepSeek-V3).
        share_on_input: whether the share multiplies an expert's input and not its output (Llama 4).
        shared_size: width of the expert that every token goes to; 0 where there is none.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    score: RouterScore = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    num_groups: int = 1
    num_chosen_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    share_on_input: bool = False
    shared_size: int = 0


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer.

    Attributes:
        rope: None where positions do not turn queries and keys.
        window: a query sees this number of positions, its own included; 0 for all (Mistral 7B, Jiang et al. 2023).
        chunk: a query sees its own run of this number of positions only, counted from the start; 0 for all (Llama 4).
        temperature: of the queries, by position.
        mixture: None for a dense layer.
        intermediate_size: width of a dense layer's feed-forward block; 0 if there is a mixture.
    """

    rope: RopeConfig | None
    intermediate_size: int
    window: int = 0
    chunk: int = 0
    temperature: Temperature | None = None
    mixture: MixtureConfig | None = None


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What a token leaves in the cache of one layer.

    Attributes:
        num_heads: heads of keys, as many as of values.
        key_width, value_width: elements of one head's key and value.
        shared: whether the value is the first `value_width` elements of the key, and is not kept again.
        window, chunk: see `LayerConfig`.
    """

    num_heads: int
    key_width: int
    value_width: int
    shared: bool = False
    window: int = 0
    chunk: int = 0

    @property
    def num_elements(self) -> int:
        """Numbers that a token takes."""
        return self.num_heads * (self.key_width + (0 if self.shared else self.value_width))

    def num_bytes(self, dtype: str) -> int:
        """Bytes that they take as `dtype`; with int8 each key and each value has a scale of four bytes."""
        return self.num_elements * DTYPE_BYTES[dtype] + (8 * self.num_heads if dtype == "int8" else 0)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that see the same positions, so that they share one block table.

    Attributes:
        layers: their indices, ascending.
    """

    window: int
    chunk: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a decoder-only transformer.

    Attributes:
        architecture: the name in the checkpoint, such as "MixtralForCausalLM".
        family: the name of its row in the table of families, such as "mixtral".
        head_dim: width of a head's query and key, and of its value unless `latent` says otherwise.
        max_position_embeddings: the most tokens that a sequence may have.
        dtype: of the checkpoint's tensors, as the file states it.
        bos_token_id, eos_token_ids: None and empty where the file names none.
        norm: RMSNorm (Zhang and Sennrich 2019), or LayerNorm (Ba et al. 2016; OPT, GPT-2, Cohere).
        parallel: whether attention and feed-forward block read the same hidden state, so that both are added to it at
            once (GPT-J, Falcon, Cohere).  Without a norm of its own, the feed-forward block reads attention's norm.
        norm_after_sum: whether a layer's two norms come after the sums (the original transformer; OPT-350m).
        activation: of the feed-forward block (`clamped_silu` is that of GPT-OSS; `relu2` of Nemotron).
        gated: whether that is activation(gate(x)) * up(x) (Shazeer 2020), or activation(up(x)).
        qk_norm: norm of queries and keys, for each head (Qwen3), or over all heads together (OLMo 2).
        qk_norm_kind, qk_norm_eps: of these norms.
        qk_norm_after_rope: whether it comes after the rotation (Llama 4, Hunyuan).
        attention_scale: multiplies the scores; 1 / sqrt(head_dim) in most families.
        attention_softcap, logit_softcap: x becomes cap * tanh(x / cap) for scores and logits; 0 for no cap (Gemma 2).
        alibi_slopes: one for each head: position j adds slope * j to the scores (ALiBi, Press et al. 2022; BLOOM);
            empty where there are none.
        latent: of latent attention, which then holds in all layers.
        embedding_multiplier, residual_multiplier, logits_multiplier: of the embedding (Gemma), of what a layer adds to
            the hidden state (Granite), and of the logits (Cohere).
        keeps_all: whether all layers share one block table, and nothing is given back before a request ends.  No
            checkpoint says so; it is set where a draft model uses the block tables too.
    """

    architecture: str
    family: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    attention_scale: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: DType
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    norm: NormKind = "rms"
    parallel: bool = False
    norm_after_sum: bool = False
    activation: Activation = "silu"
    gated: bool = True
    qk_norm: Literal["none", "head", "whole"] = "none"
    qk_norm_kind: NormKind = "rms"
    qk_norm_eps: float = 0.0
    qk_norm_after_rope: bool = False
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    alibi_slopes: tuple[float, ...] = ()
    latent: LatentConfig | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    keeps_all: bool = False

    def within(self, max_model_len: int) -> ModelConfig:
        """The architecture for sequences of at most `max_model_len` tokens."""
        layers = [replace(layer, rope=layer.rope and layer.rope.within(max_model_len)) for layer in self.layers]
        return replace(self, layers=tuple(layers))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def value_dim(self) -> int:
        """Width of a head's value."""
        return self.latent.value_dim if self.latent else self.head_dim

    @cached_property
    def kv_layouts(self) -> tuple[KVLayout, ...]:
        """What a token leaves in the cache of each layer."""
        if self.latent:
            widths = 1, self.latent.rank + self.latent.rope_dim, self.latent.rank, True
        else:
            widths = self.num_kv_heads, self.head_dim, self.head_dim, False
        return tuple(KVLayout(*widths, layer.window, layer.chunk) for layer in self.layers)

    @cached_property
    def cache_groups(self) -> tuple[LayerGroup, ...]:
        """The layers in groups of at most `num_places`, each of layers that see the same positions.

        A block of the cache holds the tokens of one group: `block_size` tokens at `num_places` layers.  So all groups
        share one pool of blocks, and a group whose layers see a window gives blocks back that no query can see.
        """
        if self.keeps_all:
            return (LayerGroup(0, 0, tuple(range(self.num_layers))),)
        kinds: dict[tuple[int, int], list[int]] = {}
        for index, layer in enumerate(self.layers):
            kinds.setdefault((layer.window, layer.chunk), []).append(index)
        size = _group_size([len(layers) for layers in kinds.values()])
        return tuple(
            LayerGroup(window, chunk, tuple(layers[start : start + size]))
            for (window, chunk), layers in kinds.items()
            for start in range(0, len(layers), size)
        )

    @property
    def num_places(self) -> int:
        """The number of layers in the largest group."""
        return max(len(group.layers) for group in self.cache_groups)

    def most_positions(self, num_slots: int) -> int:
        """Positions that a sequence may have with `num_slots` slots of cache; without end if all layers see windows."""
        sees_all = any(group.window == group.chunk == 0 for group in self.cache_groups)
        return min(self.max_position_embeddings, num_slots) if sees_all else self.max_position_embeddings

    @cached_property
    def cache_places(self) -> tuple[tuple[int, int], ...]:
        """Each layer's group, and its place in the group."""
        places = {
            layer: (index, place)
            for index, group in enumerate(self.cache_groups)
            for place, layer in enumerate(group.layers)
        }
        return tuple(places[layer] for layer in range(self.num_layers))


def _group_size(counts: list[int]) -> int:
    """The largest size of groups that leaves few places empty, for kinds with `counts` layers."""

    def empty(size: int) -> int:
        return sum(-count % size for count in counts)

    return max(size for size in range(1, max(counts) + 1) if empty(size) <= _WASTE * sum(counts))


def bytes_per_block(config: ModelConfig, dtype: str, block_size: int) -> int:
    """Bytes of KV cache that one block of `block_size` tokens takes, with elements of `dtype`."""
    return config.num_places * config.kv_layouts[0].num_bytes(dtype) * block_size
