"""What a step's attention gathers and masks, worked out once a step for all layers that see the same positions.

Queries are cut into tiles of a sequence; tiles of equal height and similar context run as one batched product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.model.architecture import ModelConfig
from shoal.model.backends.torch_layers import COLUMNS, pad_rows
from shoal.model.step.batch import ForwardBatch

# Positions that one product sums over.
STRETCH = 128
# Upper limit on the queries of a tile; a long context, which has large scores, lowers it.
_TILE_QUERIES = 64
# Upper limit on the elements of a group's scores, and of its gathered keys and values; a single tile may exceed it.
# It fits into a CPU's caches, or takes a small part of a GPU's memory.
_MAX_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}
# From this number of blocks on, contexts are grouped by the next power of two: padding at most doubles the work.
_MIN_BUCKET_BLOCKS = 16


@dataclass(frozen=True)
class CacheLayout:
    """The shape of one layer's KV cache, [num_kinds * num_kv_heads * num_blocks, block_size, key_width].

    A row holds a block's vectors of one kind and head.  The kinds are keys and values, or keys alone, of which values
    are a part.
    """

    config: ModelConfig
    num_blocks: int
    block_size: int
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def num_kv_heads(self) -> int:
        return self.config.kv_layouts[0].num_heads

    @cached_property
    def width(self) -> int:
        return self.config.kv_layouts[0].key_width

    @cached_property
    def num_kinds(self) -> int:
        return 1 if self.config.kv_layouts[0].shared else 2

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.num_kinds * self.num_kv_heads * self.num_blocks, self.block_size, self.width

    def padded(self, num_blocks: int) -> int:
        """`num_blocks` rounded up so that their positions, the columns of the scores, are a multiple of COLUMNS."""
        multiple = math.lcm(COLUMNS, self.block_size) // self.block_size
        return -(-num_blocks // multiple) * multiple

    def rows(self, block_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The cache rows of blocks: [..., num_blocks] to [num_kinds, ..., num_kv_heads, num_blocks]."""
        heads = np.arange(self.num_kinds * self.num_kv_heads)
        heads = heads.reshape(self.num_kinds, *[1] * (block_ids.ndim - 1), self.num_kv_heads, 1)
        return heads * self.num_blocks + block_ids[..., None, :]


class View(NamedTuple):
    """What a layer sees: the block table of its cache group, and its window and chunk (see `LayerConfig`)."""

    group: int
    window: int
    chunk: int

    def first_visible(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first position that a query at each of `positions` sees."""
        first = np.maximum(positions - self.window + 1, 0) if self.window else np.zeros_like(positions)
        return np.maximum(first, positions // self.chunk * self.chunk) if self.chunk else first


@dataclass(frozen=True, slots=True)
class TileGroup:
    """S tiles of n queries each over L positions, to be computed at once.

    Attributes:
        tokens: [S * n], indices of the queries in the step; a slice if the group holds all tokens, in order.
        num_queries: n.
        cache_rows: [num_kinds * S * num_kv_heads * L / block_size], rows of the cache to gather.
        mask: [S * num_kv_heads, rows, L], addends to the scores, -inf for what a query does not see; rows is n *
            queries per KV head, padded, or 1 if one row holds for all of these.
    """

    tokens: Tensor | slice
    num_queries: int
    cache_rows: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What a step's attention needs besides queries, keys and values, in layers of one view.

    Attributes:
        write_index: [T * num_kinds * num_kv_heads], position of each token's vectors in a layer's cache.
    """

    write_index: Tensor
    groups: list[TileGroup]


@dataclass(frozen=True, slots=True)
class LayerStep:
    """What a layer's attention works with in a step of T tokens, besides hidden states and weights.

    Attributes:
        kv_cache: the layer's, in the shape of `CacheLayout`.
        rotation: cos and sin, each [T, 1, 2, dim / 2]; None if positions turn nothing.
        temperature: [T, 1, 1], a factor on the queries; None for 1.
    """

    config: ModelConfig
    kv_cache: Tensor
    plan: AttentionPlan
    rotation: tuple[Tensor, Tensor] | None
    temperature: Tensor | None


def plan_attention(batch: ForwardBatch, layout: CacheLayout, view: View) -> AttentionPlan:
    """Work out where the step writes keys and values, and what each group of tiles gathers and masks."""
    slots = batch.slot_mapping[view.group].astype(np.int64)
    heads = np.arange(layout.num_kinds * layout.num_kv_heads) * layout.num_blocks * layout.block_size
    max_elements = _MAX_ELEMENTS[layout.device.type]
    tiles = _tiles(batch, layout, view, max_elements)
    groups = [
        _group(batch, tiles[:, members], layout, view, covers_step=len(members) == tiles.shape[1])
        for members in _groups(tiles, layout, max_elements)
    ]
    return AttentionPlan(torch.from_numpy((slots[:, None] + heads).ravel()).to(layout.device), groups)


def clear_fresh_blocks(kv_cache: Tensor, batch: ForwardBatch, layout: CacheLayout) -> None:
    """Zero the blocks whose first slot the step writes, in all layers [num_places, *layout].

    A group gathers whole blocks and masks what is past the context.  A failed request may have left NaN there, which no
    mask hides.
    """
    slots = batch.slot_mapping.ravel().astype(np.int64)
    fresh = slots[slots % layout.block_size == 0] // layout.block_size
    if fresh.size:
        kv_cache.index_fill_(1, torch.from_numpy(layout.rows(fresh).ravel()).to(layout.device), 0)


def _tiles(batch: ForwardBatch, layout: CacheLayout, view: View, max_elements: int) -> NDArray[np.int64]:
    """Runs of queries of one sequence, [6, num_tiles]: for each its first token, number of queries and sequence; the
    block from which on it gathers, its first block with a position that it sees, and the end of its blocks.

    What is gathered begins with a whole stretch, so that all tiles with a query add up its positions in the same order.
    """
    height = max(1, min(_TILE_QUERIES, max_elements // (layout.config.num_heads * int(batch.context_lens.max()))))
    ends = batch.query_start_loc[1:].astype(np.int64)
    starts = batch.query_start_loc[:-1].astype(np.int64)
    tiles_per_sequence = -(-(ends - starts) // height)
    sequences = np.repeat(np.arange(len(starts)), tiles_per_sequence)
    first_tiles = np.cumsum(tiles_per_sequence) - tiles_per_sequence
    within = np.arange(len(sequences)) - first_tiles[sequences]
    starts = starts[sequences] + within * height
    num_queries = np.minimum(ends[sequences] - starts, height)
    visible = view.first_visible(batch.positions[starts].astype(np.int64))
    stretch = math.lcm(STRETCH, layout.block_size)
    last_positions = batch.positions[starts + num_queries - 1]
    blocks = (visible // stretch * stretch, visible, last_positions + layout.block_size)
    return np.stack((starts, num_queries, sequences, *(positions // layout.block_size for positions in blocks)))


def _groups(tiles: NDArray[np.int64], layout: CacheLayout, max_elements: int) -> Iterator[NDArray[np.intp]]:
    """Indices, ascending, of tiles with equal height and similar context, few enough to be computed at once."""
    _, num_queries, _, first_blocks, _, ends = tiles
    buckets = np.exp2(np.ceil(np.log2(np.maximum(ends - first_blocks, _MIN_BUCKET_BLOCKS)))).astype(np.int64)
    keys = num_queries * (1 << 32) + buckets
    for key in np.unique(keys):
        members = np.flatnonzero(keys == key)
        n, context = int(key >> 32), int(key & 0xFFFFFFFF) * layout.block_size
        elements = context * max(n * layout.config.num_heads, layout.num_kinds * layout.num_kv_heads * layout.width)
        step = max(1, max_elements // elements)
        for start in range(0, len(members), step):
            yield members[start : start + step]


def _group(
    batch: ForwardBatch, tiles: NDArray[np.int64], layout: CacheLayout, view: View, *, covers_step: bool
) -> TileGroup:
    starts, num_queries, sequences, first_blocks, visible_blocks, ends = tiles
    n, width = int(num_queries[0]), layout.padded(int((ends - first_blocks).max()))
    tokens = starts[:, None] + np.arange(n)
    # What is not seen repeats a block that is: another one may be given back, or hold NaN, which no mask hides.
    columns = np.clip(first_blocks[:, None] + np.arange(width), visible_blocks[:, None], ends[:, None] - 1)
    table = batch.block_tables[:, view.group :: len(batch.slot_mapping)]
    block_ids = table[sequences[:, None], columns].astype(np.int64)
    keys_at = first_blocks[:, None] * layout.block_size + np.arange(width * layout.block_size)
    return TileGroup(
        tokens=slice(None) if covers_step else torch.from_numpy(tokens.ravel()).to(layout.device),
        num_queries=n,
        cache_rows=torch.from_numpy(layout.rows(block_ids).ravel()).to(layout.device),
        mask=_mask(batch.positions[tokens].astype(np.int64), keys_at, layout, view),
    )


def _mask(queries_at: NDArray[np.int64], keys_at: NDArray[np.int64], layout: CacheLayout, view: View) -> Tensor:
    """The mask of queries at positions [S, n] over keys at positions [S, L]."""
    (num_tiles, n), num_kv_heads, device = queries_at.shape, layout.num_kv_heads, layout.device
    first = torch.from_numpy(view.first_visible(queries_at)).to(device)[..., None]
    last, keys = torch.from_numpy(queries_at).to(device)[..., None], torch.from_numpy(keys_at).to(device)[:, None]
    hidden = (keys > last) | (keys < first) if view.window or view.chunk else keys > last
    mask = torch.zeros(hidden.shape, dtype=layout.dtype, device=device).masked_fill_(hidden, -torch.inf)
    mask, slopes = mask[:, None, :, None], layout.config.alibi_slopes
    queries_per_kv_head = layout.config.num_heads // num_kv_heads if n > 1 or slopes else 1
    if slopes:
        distances = (keys - last)[:, None, :, None]
        mask = mask + distances * torch.tensor(slopes, device=device).view(num_kv_heads, 1, -1, 1)
    mask = mask.expand(num_tiles, num_kv_heads, n, queries_per_kv_head, -1).to(layout.dtype)
    mask = mask.reshape(num_tiles * num_kv_heads, n * queries_per_kv_head, -1)
    return pad_rows(mask) if mask.shape[1] > 1 else mask
