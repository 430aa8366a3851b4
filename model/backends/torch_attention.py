"""Grouped-query attention over the paged KV cache, for sequences with any number of queries and any context.

The cache of one layer is a matrix of rows, one row per (key or value, KV head, block), each holding a block's vectors
of one head: gathering a sequence's rows gives keys and values that need no further copy.

Queries are cut into tiles of a sequence; tiles of equal height and similar context run as one batched product.  What
to gather and what to mask is computed once a step, for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from shoal.model.backends.torch_layers import COLUMNS, pad_rows
from shoal.model.record import ModelConfig
from shoal.model.step.batch import ForwardBatch

# Upper limit on the queries of a tile; a long context, which has large scores, lowers it.
_TILE_QUERIES = 64
# Upper limit on the elements of a group's scores, and of its gathered keys and values; a single tile may exceed it.
# It fits into a CPU's caches, or takes a small part of a GPU's memory.
_MAX_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}
# Positions that one product sums over.
_STRETCH = 128
# From this number of blocks on, contexts are grouped by the next power of two: padding at most doubles the work.
_MIN_BUCKET_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """The shape of one layer's KV cache, [2 * num_kv_heads * num_blocks, block_size, head_dim]."""

    config: ModelConfig
    num_blocks: int
    block_size: int
    device: torch.device
    dtype: torch.dtype

    def padded(self, num_blocks: int) -> int:
        """`num_blocks` rounded up so that their positions, the columns of the scores, are a multiple of COLUMNS."""
        multiple = math.lcm(COLUMNS, self.block_size) // self.block_size
        return -(-num_blocks // multiple) * multiple

    def rows(self, block_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The cache rows of each block's keys and values: [..., num_blocks] to [2, ..., num_kv_heads, num_blocks]."""
        num_kv_heads = self.config.num_kv_heads
        heads = np.arange(2 * num_kv_heads).reshape(2, *[1] * (block_ids.ndim - 1), num_kv_heads, 1)
        return heads * self.num_blocks + block_ids[..., None, :]


@dataclass(frozen=True, slots=True)
class TileGroup:
    """S tiles of n queries each over contexts padded to L positions, to be computed at once.

    Attributes:
        tokens: [S * n], indices of the queries in the step; a slice if the group holds all tokens, in order.
        num_queries: n.
        cache_rows: [2 * S * num_kv_heads * L / block_size], rows of the cache to gather.
        mask: [S * num_kv_heads, rows, L], 0 or -inf; rows is n * queries per KV head, padded, or 1 if n is 1.
    """

    tokens: Tensor | slice
    num_queries: int
    cache_rows: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What a step's attention needs besides queries, keys and values; the same for every layer.

    Attributes:
        write_index: [T * 2 * num_kv_heads], position of each token's key and value vectors in a layer's cache.
        fresh_rows: cache rows of the blocks whose first slot the step writes.
    """

    write_index: Tensor
    fresh_rows: Tensor
    groups: list[TileGroup]


def plan_attention(batch: ForwardBatch, layout: CacheLayout) -> AttentionPlan:
    """Work out where the step writes keys and values, and what each group of tiles gathers and masks."""
    slots = batch.slot_mapping.astype(np.int64)
    heads = np.arange(2 * layout.config.num_kv_heads) * layout.num_blocks * layout.block_size
    fresh = slots[slots % layout.block_size == 0] // layout.block_size
    max_elements = _MAX_ELEMENTS[layout.device.type]
    tiles = _tiles(batch, layout, max_elements)
    groups = [
        _group(batch, tiles[:, members], layout, covers_step=len(members) == tiles.shape[1])
        for members in _groups(tiles, layout, max_elements)
    ]
    return AttentionPlan(
        write_index=torch.from_numpy((slots[:, None] + heads).ravel()).to(layout.device),
        fresh_rows=torch.from_numpy(layout.rows(fresh).ravel()).to(layout.device),
        groups=groups,
    )


def clear_fresh_blocks(kv_cache: Tensor, plan: AttentionPlan) -> None:
    """Zero the blocks that the step starts to fill, in all layers [num_layers, *layout].

    A group gathers whole blocks and masks what is past the context.  A failed request may have left NaN there, which no
    mask hides.
    """
    if plan.fresh_rows.numel():
        kv_cache.index_fill_(1, plan.fresh_rows, 0)


def attend(queries: Tensor, keys_values: Tensor, kv_cache: Tensor, plan: AttentionPlan) -> Tensor:
    """Write the step's keys and values, then attend.

    Args:
        queries: [T, num_heads, head_dim].
        keys_values: [T, 2 * num_kv_heads, head_dim], keys first.
        kv_cache: one layer's, in the shape of `CacheLayout`.

    Returns:
        [T, num_heads * head_dim].
    """
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads = keys_values.shape[1] // 2
    kv_cache.view(-1, head_dim).index_copy_(0, plan.write_index, keys_values.reshape(-1, head_dim))
    output = queries.new_empty(num_tokens, num_heads * head_dim)
    for group in plan.groups:
        n = group.num_queries
        keys, values = kv_cache.index_select(0, group.cache_rows).view(2, len(group.mask), -1, head_dim)
        q = queries[group.tokens].view(-1, n, num_kv_heads, num_heads // num_kv_heads, head_dim)
        q = pad_rows(q.transpose(1, 2).reshape(len(group.mask), -1, head_dim))
        scores = torch.baddbmm(group.mask, q, keys.mT, alpha=1 / math.sqrt(head_dim))
        shares = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
        result = weighted_sum(shares, values)[:, : n * num_heads // num_kv_heads]
        result = result.view(-1, num_kv_heads, n, num_heads // num_kv_heads, head_dim)
        output[group.tokens] = result.transpose(1, 2).reshape(-1, num_heads * head_dim)
    return output


def weighted_sum(shares: Tensor, values: Tensor) -> Tensor:
    """shares @ values: [B, n, L] by [B, L, head_dim] to [B, n, head_dim]; n must be a multiple of 4.

    The sum over positions is taken in short stretches: MKL adds up longer ones in an order that depends on L, and L
    depends on the other sequences.  Shares past a context are 0 and change nothing.
    """
    head_dim = values.shape[2]
    if head_dim < COLUMNS:
        values = F.pad(values, (0, COLUMNS - head_dim))
    result = torch.bmm(shares[:, :, :_STRETCH], values[:, :_STRETCH])
    for start in range(_STRETCH, shares.shape[2], _STRETCH):
        end = start + _STRETCH
        result.baddbmm_(shares[:, :, start:end], values[:, start:end])
    return result[:, :, :head_dim]


def _tiles(batch: ForwardBatch, layout: CacheLayout, max_elements: int) -> NDArray[np.int64]:
    """Runs of queries of one sequence, [4, num_tiles]: for each its first token, number of queries, sequence, and
    number of blocks of context up to the last query."""
    height = max(1, min(_TILE_QUERIES, max_elements // (layout.config.num_heads * int(batch.context_lens.max()))))
    ends = batch.query_start_loc[1:].astype(np.int64)
    starts = batch.query_start_loc[:-1].astype(np.int64)
    tiles_per_sequence = -(-(ends - starts) // height)
    sequences = np.repeat(np.arange(len(starts)), tiles_per_sequence)
    first_tiles = np.cumsum(tiles_per_sequence) - tiles_per_sequence
    within = np.arange(len(sequences)) - first_tiles[sequences]
    starts = starts[sequences] + within * height
    num_queries = np.minimum(ends[sequences] - starts, height)
    last_positions = batch.positions[starts + num_queries - 1]
    return np.stack((starts, num_queries, sequences, last_positions // layout.block_size + 1))


def _groups(tiles: NDArray[np.int64], layout: CacheLayout, max_elements: int) -> Iterator[NDArray[np.intp]]:
    """Indices, ascending, of tiles with equal height and similar context, few enough to be computed at once."""
    config, (_, num_queries, _, num_blocks) = layout.config, tiles
    buckets = np.exp2(np.ceil(np.log2(np.maximum(num_blocks, _MIN_BUCKET_BLOCKS)))).astype(np.int64)
    keys = num_queries * (1 << 32) + buckets
    for key in np.unique(keys):
        members = np.flatnonzero(keys == key)
        n, context = int(key >> 32), int(key & 0xFFFFFFFF) * layout.block_size
        elements = context * max(n * config.num_heads, 2 * config.num_kv_heads * config.head_dim)
        step = max(1, max_elements // elements)
        for start in range(0, len(members), step):
            yield members[start : start + step]


def _group(batch: ForwardBatch, tiles: NDArray[np.int64], layout: CacheLayout, *, covers_step: bool) -> TileGroup:
    starts, num_queries, sequences, num_blocks = tiles
    n, width = int(num_queries[0]), layout.padded(int(num_blocks.max()))
    tokens = starts[:, None] + np.arange(n)
    # Padding repeats the sequence's own last block: another block may hold NaN, which no mask hides.
    columns = np.minimum(np.arange(width), num_blocks[:, None] - 1)
    table = batch.block_tables[sequences[:, None], columns].astype(np.int64)
    return TileGroup(
        tokens=slice(None) if covers_step else torch.from_numpy(tokens.ravel()).to(layout.device),
        num_queries=n,
        cache_rows=torch.from_numpy(layout.rows(table).ravel()).to(layout.device),
        mask=_mask(torch.from_numpy(batch.positions[tokens]).to(layout.device), width * layout.block_size, layout),
    )


def _mask(positions: Tensor, context: int, layout: CacheLayout) -> Tensor:
    """Additive mask of queries at `positions` [S, n]: a query sees its own position and those before."""
    (num_tiles, n), num_kv_heads = positions.shape, layout.config.num_kv_heads
    hidden = torch.arange(context, device=layout.device) > positions[..., None]
    mask = torch.zeros(hidden.shape, dtype=layout.dtype, device=layout.device).masked_fill_(hidden, -torch.inf)
    queries_per_kv_head = layout.config.num_heads // num_kv_heads if n > 1 else 1
    mask = mask[:, None, :, None].expand(num_tiles, num_kv_heads, n, queries_per_kv_head, context)
    mask = mask.reshape(num_tiles * num_kv_heads, -1, context)
    return pad_rows(mask) if n > 1 else mask
