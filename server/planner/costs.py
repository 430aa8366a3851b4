"""What steps of a model cost: its shapes, in the formulas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from shoal.model.architecture import KVLayout, LayerConfig, ModelConfig
from shoal.model.numbers import count_numbers
from shoal.model.record import ModelRecord
from shoal.scheduler.errors import ConfigError
from shoal.server.inspection import sort_arrays
from shoal.server.planner import formulas
from shoal.server.planner.machines import Machine

_OUTSIDE = ("embedding", "head", "positions", "embedding_norm", "norm")  # of the layers, by the names of arrays


@dataclass(frozen=True)
class Step:
    """A step in which all sequences do the same.

    Attributes:
        num_tokens: of each sequence.
        length: of each sequence after the step.
        num_logits: of all sequences together.
    """

    num_seqs: int
    num_tokens: int
    length: int
    num_logits: int

    @classmethod
    def decode(cls, num_seqs: int, length: int, num_spec_tokens: int = 0) -> Step:
        each = num_spec_tokens + 1
        return cls(num_seqs, each, length + num_spec_tokens, num_seqs * each)

    @classmethod
    def prefill(cls, length: int) -> Step:
        return cls(1, length, length, 1)


@dataclass(frozen=True)
class LayerCosts:
    """A layer's parameters, and the weights of its matrices that one token is multiplied with."""

    num_parameters: int
    num_expert_parameters: int
    num_active: float


@dataclass(frozen=True)
class Costs:
    """What steps of a model cost.

    Attributes:
        read: parameters that every step reads: all but experts and tables of which it takes rows.
        head: weights of the head.
        bytes_each: of a number in cache and hidden states.
        weight_bytes_each: of a weight on average, as the checkpoint has them.
    """

    config: ModelConfig
    num_parameters: int
    layers: tuple[LayerCosts, ...]
    read: int
    head: int
    dtype: str
    bytes_each: int
    weight_bytes_each: float

    @classmethod
    def of(cls, record: ModelRecord, dtype: str, bytes_each: int) -> Costs:
        num_layers = record.config.num_layers
        total, experts, active = [0] * num_layers, [0] * num_layers, [0.0] * num_layers
        read = 0
        for part, name, layer, array, share in sort_arrays(record):
            if name.removesuffix(".bias") not in _OUTSIDE:
                total[layer] += count_numbers(array)
                active[layer] += count_numbers(array) * share if array.ndim > 1 else 0
            if part == "experts":
                experts[layer] += count_numbers(array)
            elif part not in ("embedding", "positions"):
                read += count_numbers(array)
        layers = tuple(map(LayerCosts, total, experts, active))
        head, stored = count_numbers(record.head.weight), sum(array.nbytes for *_, array in record.tensors())
        weight_bytes_each = stored / record.num_parameters
        return cls(record.config, record.num_parameters, layers, read, head, dtype, bytes_each, weight_bytes_each)

    @cached_property
    def layouts(self) -> Counter[KVLayout]:
        """Layers by what they keep and see."""
        return Counter(self.config.kv_layouts)

    @property
    def num_active(self) -> float:
        """Weights that one token is multiplied with."""
        return self.head + sum(layer.num_active for layer in self.layers)

    @property
    def weight_bytes(self) -> float:
        return self.num_parameters * self.weight_bytes_each

    def cache_bytes(self, length: int) -> float:
        """That a sequence reads, which is what it keeps where windows give back what nobody sees."""
        return self.bytes_each * formulas.cache_elements(self.config.kv_layouts, length)

    def num_fitting(self, machine: Machine, request_bytes: float) -> int:
        """Requests that fit beside the weights."""
        return int(max(machine.memory - self.weight_bytes, 0) // request_bytes)

    def expert_bytes(self, num_tokens: float) -> float:
        """Of the experts that a step reads."""
        return self.weight_bytes_each * sum(
            own.num_expert_parameters * formulas.touched_experts(layer.mixture, num_tokens)
            for own, layer in zip(self.layers, self.config.layers, strict=True)
            if layer.mixture
        )

    def attention_flops(self, step: Step) -> float:
        return sum(
            count
            * formulas.attention_flops(
                layout,
                self.config.num_heads,
                step.num_seqs * formulas.num_pairs(layout, step.length - step.num_tokens, step.num_tokens),
            )
            for layout, count in self.layouts.items()
        )

    def flops(self, step: Step) -> float:
        in_layers = sum(layer.num_active for layer in self.layers)
        return (
            formulas.matrix_flops(in_layers, step.num_seqs * step.num_tokens)
            + formulas.matrix_flops(self.head, step.num_logits)
            + self.attention_flops(step)
        )

    def bytes_read(self, step: Step) -> float:
        weights = self.read * self.weight_bytes_each + self.expert_bytes(step.num_seqs * step.num_tokens)
        return weights + step.num_seqs * self.cache_bytes(step.length)

    def is_read(self, step: Step, machine: Machine) -> bool:
        """Whether reading limits the step, and not computing."""
        ridge = formulas.ridge(machine.flops[self.dtype], machine.bandwidth)
        return self.flops(step) / self.bytes_read(step) < ridge

    def seconds(self, step: Step, machine: Machine) -> float:
        """The least time of the step."""
        return formulas.roofline_seconds(
            self.flops(step), self.bytes_read(step), machine.flops[self.dtype], machine.bandwidth
        )


@dataclass(frozen=True)
class Split:
    """A model on several ranks: `tp` of them share each matrix, `ep` the experts, and `pp` have layers of their own.

    Sequences are shared among the expert-parallel ranks, which have all else in common, and are cut into as many
    micro-batches as there are stages, so that every stage has work.
    """

    tp: int = 1
    ep: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.ep * self.pp

    def weight_bytes(self, costs: Costs) -> float:
        """On each rank."""
        experts = costs.weight_bytes_each * sum(layer.num_expert_parameters for layer in costs.layers)
        return ((costs.weight_bytes - experts) / self.tp + experts / (self.tp * self.ep)) / self.pp

    def wire_bytes(self, costs: Costs, num_tokens: float) -> float:
        """What a rank sends in a step of `num_tokens` tokens, which pass all stages."""
        return sum(self._sent(costs, num_tokens))

    def _sent(self, costs: Costs, num_tokens: float) -> Iterator[float]:
        """For each kind of splitting, what a rank of a stage sends."""
        config, own = costs.config, num_tokens / self.ep
        token_bytes = config.hidden_size * costs.bytes_each
        sums = config.num_layers * (1 if config.parallel else 2) / self.pp
        yield formulas.tensor_parallel_bytes(token_bytes, own, 1, self.tp) * sums
        for layer in config.layers:
            if layer.mixture and self.ep > 1:
                sent = formulas.expert_parallel_bytes(
                    token_bytes, num_tokens, layer.mixture.num_experts_per_tok, self.ep
                )
                yield sent / self.pp
        if self.pp > 1:
            yield formulas.pipeline_bytes(token_bytes, own)

    def gathered_bytes(self, costs: Costs, num_tokens: float, num_logits: float) -> float | None:
        """What a rank of `shoal serve` sends on average, which gathers columns so that bits are those of one rank.

        None where it serves no such split.  Experts are chosen evenly.
        """
        if 1 < self.tp != self.ep > 1:
            return None
        config, ranks = costs.config, max(self.tp, self.ep)
        token_bytes = num_tokens * config.hidden_size * costs.bytes_each
        gathered = sum(self._gathered_columns(layer, config) for layer in config.layers)
        sent = ranks * formulas.all_gather_bytes(num_tokens * gathered * costs.bytes_each, ranks)
        sent += ranks * formulas.all_reduce_bytes(token_bytes, ranks)
        sent += (self.pp - 1) * ranks * formulas.pipeline_bytes(config.hidden_size * costs.bytes_each, num_tokens)
        head_ranks = ranks - (self.pp == 1)  # rank 0 need send nothing to itself
        sent += head_ranks * -(-config.vocab_size // ranks) * num_logits * costs.bytes_each
        return sent / (ranks * self.pp)

    def _gathered_columns(self, layer: LayerConfig, config: ModelConfig) -> int:
        """Numbers of a token that are gathered in a layer."""
        mixture, hidden, columns = layer.mixture, config.hidden_size, 0
        if self.tp > 1:
            columns += config.num_heads * config.value_dim + hidden
            if config.qk_norm == "whole":
                columns += (config.num_heads + config.num_kv_heads) * config.head_dim
            if mixture is None:
                columns += layer.intermediate_size + hidden
            elif mixture.shared_size:
                columns += mixture.shared_size + hidden
            if mixture and self.ep == 1:
                columns += mixture.num_experts_per_tok * mixture.intermediate_size + hidden
        if mixture and self.ep > 1:
            columns += mixture.num_experts_per_tok * hidden
        return columns

    def seconds(self, costs: Costs, step: Step, machine: Machine) -> tuple[float, float]:
        """The least time in which all sequences get through the step, and the part of it that is on the wire.

        Nothing is computed while something is sent.
        """
        num_seqs = step.num_seqs / self.pp
        num_tokens = num_seqs * step.num_tokens
        experts = costs.expert_bytes(num_tokens) / (self.tp * self.ep)
        # Heads of keys and values that are fewer than ranks are kept by several of them.
        cached = (
            num_seqs / self.ep * costs.cache_bytes(step.length) / min(self.tp, costs.config.kv_layouts[0].num_heads)
        )
        num_bytes = (costs.read * costs.weight_bytes_each / self.tp + experts + cached) / self.pp
        computing = formulas.roofline_seconds(
            costs.flops(step) / self.pp / self.ranks, num_bytes, machine.flops[costs.dtype], machine.bandwidth
        )
        sending = self.wire_bytes(costs, num_tokens) / machine.link if machine.link else 0.0
        return self.pp * (computing + sending), self.pp * sending


def most_ranks(costs: Costs) -> dict[str, int]:
    """The most ranks that a model can be split over, by the way of splitting."""
    mixtures = [layer.mixture.num_experts for layer in costs.config.layers if layer.mixture]
    return {"tp": costs.config.num_heads, "ep": max(mixtures, default=1), "pp": costs.config.num_layers}


def check_split(costs: Costs, asked: Split) -> None:
    """Refuse more ranks than there is to share.

    Raises:
        ConfigError: naming the way of splitting.
    """
    for way, most in most_ranks(costs).items():
        if (ranks := getattr(asked, way)) > most:
            raise ConfigError(f"{way} {ranks}: the model can be split over at most {most} in this way", param=way)
