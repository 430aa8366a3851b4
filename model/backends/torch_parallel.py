"""The torch backend of one rank among several: its layers, its heads and columns, its experts.

Rank 0 tells the others of each step, computes its part as they do, and gets the logits.  `split.py` says
whose is what.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.model.backends.split import Shard
from shoal.model.backends.torch_backend import TorchBackend
from shoal.model.backends.torch_layers import linear, norm
from shoal.model.backends.torch_ranks import Links, Spread
from shoal.model.record import ModelRecord
from shoal.model.step.batch import ForwardBatch

# Whoever watches the ranks ends this process within this time, with the name of the one that has ended.
_LAST_WORDS_SECONDS = 1.0


class ParallelBackend(TorchBackend):
    """Implements `shoal.model.step.batch.Backend` on rank 0; the others `follow`.

    If a step cannot be completed, whatever the reason, the ranks no longer agree on where they are: rank 0 raises
    SystemExit, so that another engine takes its place.

    Args:
        record: the whole model, of which the shard's part alone is read.
        tell: hands a step, and its number of layers, to the other ranks; on these it does nothing.
    """

    def __init__(
        self,
        record: ModelRecord,
        shard: Shard,
        links: Links,
        tell: Callable[[ForwardBatch, int | None], None],
        *,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
        num_blocks: int,
        block_size: int,
        num_threads: int | None = None,
    ) -> None:
        split = shard.split
        super().__init__(
            shard.record(record),
            device=device,
            dtype=dtype,
            num_blocks=num_blocks,
            block_size=block_size,
            num_threads=num_threads,
            first_layer=shard.layers(record.config.num_layers).start,
            spread=None if links.ranks is None else Spread(links.ranks, split.tensor > 1, split.expert > 1),
        )
        self._shard, self._links, self._tell = shard, links, tell

    @property
    def num_bytes_sent(self) -> int:
        """By this rank, of the model's numbers."""
        return self._links.num_bytes_sent

    @torch.inference_mode()
    def follow(self, batch: ForwardBatch, num_layers: int | None) -> None:
        """Compute this rank's part of a step that rank 0 has told of."""
        self._compute(batch, num_layers)

    def _logits(self, batch: ForwardBatch, num_layers: int | None = None) -> Tensor:
        try:
            self._tell(batch, num_layers)
            own = self._compute(batch, num_layers)
            return self._finished(self._collect(batch, own))
        except Exception as error:
            time.sleep(_LAST_WORDS_SECONDS)
            raise SystemExit(f"the ranks cannot go on: {type(error).__name__}: {error}") from error

    def _compute(self, batch: ForwardBatch, num_layers: int | None) -> Tensor | None:
        """This rank's columns of the logits, if it is rank 0 and has the head; else they are sent."""
        shard, stages = self._shard, self._links.stages
        if num_layers is not None:
            num_layers = max(num_layers - shard.layers(self._config.num_layers).start, 0)
        x = self._hidden(batch, num_layers)
        if not shard.is_last:
            stages.send(x, shard.rank + shard.split.stage_size)
            return None
        hidden = None if batch.hidden is None else norm(x, self._norm)
        x = norm(x.index_select(0, self._index(batch.logits_indices)), self._norm)
        logits = linear(x, self._head)
        logits = F.pad(logits, (0, self._width - logits.shape[1]))
        if shard.rank == 0:
            if batch.hidden is not None and hidden is not None:
                batch.hidden[:] = hidden.float().cpu().numpy()
            return logits
        stages.send(logits, 0)
        if shard.stage > 0 and shard.member == 0 and hidden is not None:
            stages.send(hidden, 0)
        return None

    def _collect(self, batch: ForwardBatch, own: Tensor | None) -> Tensor:
        """The logits [num_logits, vocab_size] of the ranks of the last stage, of which rank 0 may be one."""
        split, stages = self._shard.split, self._links.stages
        num_logits, first = len(batch.logits_indices), split.num_ranks - split.stage_size
        parts = [] if own is None else [own]
        for rank in range(first + len(parts), split.num_ranks):
            parts.append(stages.receive(self._empty(num_logits, self._width), rank))
            if own is None and rank == first and batch.hidden is not None:
                hidden = stages.receive(self._empty(len(batch.token_ids), self._config.hidden_size), rank)
                batch.hidden[:] = hidden.float().cpu().numpy()
        return torch.cat(parts, dim=1)[:, : self._config.vocab_size]

    def _embed(self, batch: ForwardBatch, positions: Tensor) -> Tensor:
        if self._shard.stage == 0:
            return super()._embed(batch, positions)
        x = self._empty(len(batch.token_ids), self._config.hidden_size)
        return self._links.stages.receive(x, self._shard.rank - self._shard.split.stage_size)

    def _look_up(self, token_ids: Tensor) -> Tensor:
        if self._links.ranks is None:
            return super()._look_up(token_ids)
        own = self._shard.tokens(self._config.vocab_size)
        rows = self._empty(len(token_ids), self._config.hidden_size).zero_()
        is_own = (token_ids >= own.start) & (token_ids < own.stop)
        rows[is_own] = self._embedding[token_ids[is_own] - own.start]
        return self._links.ranks.pick(rows)

    @property
    def _width(self) -> int:
        """Columns of the logits that each rank of the last stage sends."""
        return -(-self._config.vocab_size // self._shard.split.stage_size)

    def _empty(self, num_rows: int, width: int) -> Tensor:
        return self._embedding.new_empty(num_rows, width)
