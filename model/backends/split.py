"""Splitting a model over ranks: which part of the record is whose.

Every output column is one rank's whole chain of additions, and columns are gathered.  So a model has the same bits on
any number of ranks; a split of rows would add up partial sums in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from shoal.model.architecture import LayerConfig, ModelConfig
from shoal.model.numbers import Array
from shoal.model.record import Attention, Experts, FeedForward, LatentAttention, Layer, Linear, ModelRecord, Norm
from shoal.scheduler.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Split:
    """How many ranks share a model.

    Attributes:
        tensor: ranks that share the heads and columns of each layer.
        expert: ranks that share the experts of each layer, which are whole.
        pipeline: stages, each with layers of its own.
    """

    tensor: int = 1
    expert: int = 1
    pipeline: int = 1

    @property
    def stage_size(self) -> int:
        """Ranks of a stage: those that share heads and columns share the experts too."""
        return max(self.tensor, self.expert)

    @property
    def num_ranks(self) -> int:
        return self.stage_size * self.pipeline

    def check(self, config: ModelConfig) -> None:
        """Refuse what the model cannot be split into.

        Raises:
            ConfigError: naming the setting, or the two that do not go together.
        """
        if 1 < self.tensor != self.expert > 1:
            raise ConfigError(
                f"tensor_parallel {self.tensor} and expert_parallel {self.expert}: the same ranks share columns and "
                "experts, so that the two are equal where both are above 1",
                param="expert_parallel",
            )
        if self.pipeline > config.num_layers:
            raise ConfigError(
                f"pipeline_parallel {self.pipeline}: the model has {config.num_layers} layers",
                param="pipeline_parallel",
            )
        num_experts = [layer.mixture.num_experts for layer in config.layers if layer.mixture]
        if self.expert > min(num_experts, default=1):
            raise ConfigError(
                f"expert_parallel {self.expert}: the model has {min(num_experts, default=0)} experts in a layer",
                param="expert_parallel",
            )
        for what, size in self._shared_out(config):
            if size % self.tensor:
                raise ConfigError(
                    f"tensor_parallel {self.tensor}: it does not divide the model's {what} {size}",
                    param="tensor_parallel",
                )
        if not config.latent and self.tensor % config.num_kv_heads and config.num_kv_heads % self.tensor:
            raise ConfigError(
                f"tensor_parallel {self.tensor}: the model's {config.num_kv_heads} heads of keys and values can be "
                "neither shared out evenly nor kept by several ranks each",
                param="tensor_parallel",
            )
        if config.qk_norm == "whole" and self.tensor > config.num_kv_heads:
            raise ConfigError(
                f"tensor_parallel {self.tensor}: a norm over all keys needs at least as many of their heads, which are "
                f"{config.num_kv_heads}",
                param="tensor_parallel",
            )

    def _shared_out(self, config: ModelConfig) -> Iterator[tuple[str, int]]:
        """What the ranks of a stage have equal parts of."""
        yield "num_heads", config.num_heads
        yield "hidden_size", config.hidden_size
        for layer in config.layers:
            if layer.mixture is None:
                yield "intermediate_size", layer.intermediate_size
            else:
                yield "shared_size", layer.mixture.shared_size
                if self.expert == 1:
                    yield "intermediate_size of experts", layer.mixture.intermediate_size


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a model that one rank has.

    Attributes:
        rank: from 0; the ranks of a stage follow each other.
    """

    split: Split
    rank: int

    @property
    def stage(self) -> int:
        return self.rank // self.split.stage_size

    @property
    def member(self) -> int:
        """The place in the stage."""
        return self.rank % self.split.stage_size

    @property
    def is_last(self) -> bool:
        """Whether this is a rank of the last stage, which has the head."""
        return self.stage == self.split.pipeline - 1

    def layers(self, num_layers: int) -> range:
        """The layers of the stage."""
        start, end = (num_layers * stage // self.split.pipeline for stage in (self.stage, self.stage + 1))
        return range(start, end)

    def experts(self, num_experts: int) -> range:
        """The experts of the rank; all where their columns are shared."""
        return experts_of(self.member, self.split.expert, num_experts)

    def tokens(self, vocab_size: int) -> range:
        """The tokens of which the rank has the embedding and the head; those of the last may be fewer."""
        width = -(-vocab_size // self.split.stage_size)
        return range(min(width * self.member, vocab_size), min(width * (self.member + 1), vocab_size))

    def config(self, config: ModelConfig) -> ModelConfig:
        """The architecture with the heads of the rank, and all layers."""
        heads, kv_heads = self._heads(config)
        slopes = config.alibi_slopes and config.alibi_slopes[heads]
        return replace(
            config, num_heads=heads.stop - heads.start, num_kv_heads=kv_heads.stop - kv_heads.start, alibi_slopes=slopes
        )

    def record(self, record: ModelRecord) -> ModelRecord:
        """The part of the record, as views: its layers, and in them the heads, columns and experts of the rank.

        Experts of which a rank has no more than some columns are all there.  Output columns of attention and of blocks
        are this rank's, and so are the rows of embedding and head; norms and the router are whole.
        """
        config, tokens = record.config, self.tokens(record.config.vocab_size)
        vocabulary = slice(tokens.start, tokens.stop)
        embedding = record.embedding[vocabulary if self.stage == 0 else slice(0)]
        head = _rows(record.head, vocabulary if self.is_last else slice(0))
        if record.head.weight is record.embedding and self.stage == 0 and self.is_last:
            head = replace(head, weight=embedding)
        return replace(
            record,
            config=self.config(config),
            embedding=embedding,
            layers=tuple(
                self._layer(record.layers[i], config, config.layers[i]) for i in self.layers(config.num_layers)
            ),
            head=head,
        )

    def _part(self, size: int) -> slice:
        """The rank's part of columns."""
        width = size // self.split.tensor
        return slice(width * self.member, width * (self.member + 1)) if self.split.tensor > 1 else slice(0, size)

    def _heads(self, config: ModelConfig) -> tuple[slice, slice]:
        """The rank's heads of queries, and those of keys and values that these attend to."""
        heads, each = self._part(config.num_heads), config.num_heads // config.num_kv_heads
        if config.latent:
            return heads, slice(0, config.num_kv_heads)
        return heads, slice(heads.start // each, -(-heads.stop // each))

    def _layer(self, layer: Layer, config: ModelConfig, kind: LayerConfig) -> Layer:
        attention, block = layer.attention, layer.feed_forward
        return replace(
            layer,
            attention=self._attention(attention, config)
            if isinstance(attention, Attention)
            else self._latent_attention(attention, config),
            feed_forward=self._experts(block) if isinstance(block, Experts) else self._feed_forward(block),
        )

    def _attention(self, attention: Attention, config: ModelConfig) -> Attention:
        heads, kv_heads = self._heads(config)
        queries, keys = _widened(heads, config.head_dim), _widened(kv_heads, config.head_dim)
        is_whole = config.qk_norm == "whole"
        return Attention(
            q_proj=_rows(attention.q_proj, queries),
            k_proj=_rows(attention.k_proj, keys),
            v_proj=_rows(attention.v_proj, keys),
            o_proj=self._columns(attention.o_proj),
            q_norm=attention.q_norm if is_whole else _norm_rows(attention.q_norm, queries),
            k_norm=attention.k_norm if is_whole else _norm_rows(attention.k_norm, keys),
            sinks=_vector(attention.sinks, heads),
        )

    def _latent_attention(self, attention: LatentAttention, config: ModelConfig) -> LatentAttention:
        heads, _ = self._heads(config)
        latent = config.latent
        assert latent is not None
        return replace(
            attention,
            q_proj=_rows(attention.q_proj, _widened(heads, latent.nope_dim + latent.rope_dim)),
            k_up=attention.k_up[heads],
            v_up=attention.v_up[heads],
            o_proj=self._columns(attention.o_proj),
        )

    def _feed_forward(self, block: FeedForward) -> FeedForward:
        gate = block.gate_proj
        return FeedForward(gate and self._columns(gate), self._columns(block.up_proj), self._columns(block.down_proj))

    def _experts(self, block: Experts) -> Experts:
        own = self.experts(len(block.experts))
        experts = block.experts[own.start : own.stop]
        if self.split.expert == 1:
            experts = tuple(map(self._feed_forward, experts))
        return replace(block, experts=experts, shared=block.shared and self._feed_forward(block.shared))

    def _columns(self, linear: Linear) -> Linear:
        """The rank's part of the outputs."""
        return _rows(linear, self._part(len(linear.weight)))


def experts_of(member: int, num_members: int, num_experts: int) -> range:
    """The experts of a rank, of which all have nearly as many; the same where there is one member."""
    if num_members == 1:
        return range(num_experts)
    start, end = (num_experts * index // num_members for index in (member, member + 1))
    return range(start, end)


def _widened(heads: slice, width: int) -> slice:
    """The elements of heads that are `width` wide."""
    return slice(heads.start * width, heads.stop * width)


def _rows(linear: Linear, rows: slice) -> Linear:
    return Linear(linear.weight[rows], _vector(linear.bias, rows))


def _norm_rows(norm: Norm | None, rows: slice) -> Norm | None:
    return norm and Norm(_vector(norm.gain, rows), _vector(norm.bias, rows))


def _vector(array: Array | None, part: slice) -> Array | None:
    return None if array is None else array[part]
