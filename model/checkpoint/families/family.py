"""What a row of the table of families says: how a `config.json` and tensors map onto the record.

A row names only what differs from Llama.  Where a row gives a `Source`, that is a value, or a function of the
config's fields that gives the value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shoal.model.architecture import LatentConfig, Temperature
from shoal.model.checkpoint.families.transform import Split, by_parts
from shoal.model.checkpoint.parts import Fields

Source = Any
Kinds = Callable[[Fields, int], list[str]]
"""Gives each layer's kind of attention: FULL, SLIDING or CHUNKED."""
Rotates = Callable[[Fields, list[str]], list[bool]]
"""Gives for each layer, of which the kind is known, whether it has RoPE."""

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"

# Parts of the record that may have a bias.
QKV = ("q_proj", "k_proj", "v_proj", "qkv_proj")
ATTENTION = (*QKV, "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
NORMS = (
    "input_norm",
    "feed_forward_norm",
    "norm",
    "embedding_norm",
    "attention_output_norm",
    "feed_forward_output_norm",
)
ALL = (*ATTENTION, *FEED_FORWARD, *NORMS)

LLAMA_NAMES: dict[str, str] = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers.{}.",
    "input_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
    # Of a mixture.
    "router": "mlp.gate",
    "expert_gate_proj": "mlp.experts.{}.gate_proj",
    "expert_up_proj": "mlp.experts.{}.up_proj",
    "expert_down_proj": "mlp.experts.{}.down_proj",
    "experts_gate_up": "mlp.experts.gate_up_proj",
    "experts_down": "mlp.experts.down_proj",
    "shared_gate_proj": "mlp.shared_experts.gate_proj",
    "shared_up_proj": "mlp.shared_experts.up_proj",
    "shared_down_proj": "mlp.shared_experts.down_proj",
}


def all_full(fields: Fields, count: int) -> list[str]:
    """Full attention in all layers."""
    given = fields.get("layer_types")
    if given is not None and (not isinstance(given, list) or any(kind != FULL for kind in given)):
        raise fields.error("layer_types", f"only {FULL} is supported")
    return [FULL] * count


def everywhere_turned(fields: Fields, kinds: list[str]) -> list[bool]:
    """RoPE in all layers."""
    return [True] * len(kinds)


@dataclass(frozen=True, slots=True)
class Tensors:
    """How a family's files name and store the arrays of the record.

    Attributes:
        names: of the parts that differ from `LLAMA_NAMES`; None for a part that the family does not have; a tuple where
            files differ.  Parts of a layer are named after the prefix "layer"; `{}` stands for the number of the layer,
            expert or head.  Beside the fields of the record there are "qkv_proj" and "gate_up_proj" (fused),
            "expert_gate_proj" and so on (the tensors of one expert), "experts_gate_up" or "experts_gate" and
            "experts_up", and "experts_down" (of all experts in one tensor, which is used if a file has it),
            "shared_gate_proj" and so on, "q_up" (from the latent of queries), "kv_up" (of latent attention, fused), and
            "project_in" and "project_out" (between a narrow embedding and the layers).
        prefix: of names, which some files leave out.
        biases: the parts that have a bias.
        gains, head_gains: whether norms have a gain, and those of queries and keys for each head.
        norms_with_rope: whether only the queries and keys of layers with RoPE have a norm (Llama 4).
        gain_offset: added to the gains that a file holds (Gemma).
        qkv: cuts a fused q/k/v projection.
        transposed: whether matrices are [in, out].
        interleaved: source of whether elements 2 i and 2 i + 1 of a head turn together, and not i and i + dim / 2.
        experts_transposed: whether tensors of all experts are [experts, in, out].
        experts_alternate: whether rows of gate and up alternate in a fused tensor of all experts.
        first_position: row of the table of positions that stands for position 0 (OPT).
        sinusoidal: whether the table of positions is made, and not in the file (XGLM).
        ignored: pattern of further tensors that the model does not need.
        further_layers: source of the number of layers that follow the model's own ones and predict further tokens;
            no part of the model (DeepSeek-V3): see `checkpoint/prediction.py`.
    """

    names: Mapping[str, Source] = field(default_factory=dict)
    prefix: str = "model."
    biases: Mapping[tuple[str, ...], Source] = field(default_factory=dict)
    gains: bool = True
    head_gains: bool = True
    norms_with_rope: bool = False
    gain_offset: float = 0.0
    qkv: Split = by_parts
    transposed: bool = False
    interleaved: Source = False
    experts_transposed: bool = False
    experts_alternate: bool = False
    first_position: int = 0
    sinusoidal: bool = False
    ignored: str | None = None
    further_layers: Source = 0

    def resolve(self, fields: Fields) -> Tensors:
        """These tensors with values for all sources."""
        names = {part: resolve(source, fields) for part, source in (LLAMA_NAMES | dict(self.names)).items()}
        biases = {parts: resolve(source, fields) for parts, source in self.biases.items()}
        return replace(
            self,
            names={part: name if isinstance(name, tuple) else (name,) for part, name in names.items() if name},
            biases={parts: True for parts, has_bias in biases.items() if has_bias},
            interleaved=resolve(self.interleaved, fields),
            further_layers=resolve(self.further_layers, fields),
        )

    def has_bias(self, part: str) -> bool:
        return any(part in parts for parts in self.biases)


@dataclass(frozen=True, slots=True)
class Mixture:
    """A family's mixture of experts.

    Attributes:
        fields: sources of the fields of `MixtureConfig`.
        layers: gives for each layer whether it has the mixture; all have it by default.
    """

    fields: Mapping[str, Source]
    layers: Callable[[Fields, int], list[bool]] = lambda fields, count: [True] * count


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A row of the table.

    Attributes:
        keys: names of keys of `config.json`, and Llama's names for the same.
        nested: a key that holds an object, whose keys are named after it: "attn_config.alibi" (MPT).
        defaults: values of keys that a file may leave out, by Llama's names.  A function of the fields gives the value
            also where the file has null.
        only: keys that no backend implements, with the values under which they change nothing; others are refused.
            Of a list all elements must be among them.
        ignored: keys that never change the numbers, beyond `HARMLESS`.
        fields: sources of the fields of `ModelConfig`.
        kinds: of attention.
        rotates: which layers have RoPE; None where none has.
        local_rope: whether layers with a window have a RoPE of their own, without the scaling (Gemma 3).
        rotary_dim: source of the number of elements of a head that turn, if `partial_rotary_factor` does not give it.
        dense_width: source of the width of dense layers.
        latent: source of the latent attention.
        temperature: of the queries of a layer, made of the fields and of whether the layer has RoPE.
        mixture: of experts.
        tensors: in files.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    nested: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    fields: Mapping[str, Source] = field(default_factory=dict)
    kinds: Kinds = all_full
    rotates: Rotates | None = everywhere_turned
    local_rope: bool = False
    rotary_dim: Source = None
    dense_width: Source = lambda fields: fields.integer("intermediate_size", minimum=1)
    latent: Callable[[Fields], LatentConfig] | None = None
    temperature: Callable[[Fields, bool], Temperature | None] | None = None
    mixture: Mixture | None = None
    tensors: Tensors = field(default_factory=Tensors)


def resolve(source: Source, fields: Fields) -> Any:
    """The source's value."""
    return source(fields) if callable(source) else source
