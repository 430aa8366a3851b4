"""The KV cache as requests use it: block tables that grow, and give back what no query sees any more."""

from __future__ import annotations

from shoal.scheduler.block_pool import BlockPool
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.prefix_cache import UNSEEN, PrefixCache
from shoal.scheduler.request import Request


class KVCache:
    """Block tables over a `BlockPool`, with a prefix cache.

    A request has a block table for each cache group, all of one length, in one list: block i of group g stands at
    i * num_groups + g.  Where the layers of a group see a window, its blocks go back when the window has passed.

    Attributes:
        num_promised: available blocks that requests need until their known tokens are computed.  Nobody else gets
            them, so that no two half-computed prompts can block each other.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.pool = BlockPool(config.num_blocks)
        self.num_promised = 0
        self._config, self._prefixes = config, PrefixCache(self.pool, config)
        self._block_size, self._num_groups = config.block_size, len(config.cache_groups)
        self._windows = [(number, group) for number, group in enumerate(config.cache_groups) if not group.sees_all]

    def reserve(self, request: Request) -> list[int] | None:
        """Extend the block tables to hold all tokens of the next step, drafted ones included.

        A request without blocks takes what the prefix cache holds of it first, and `num_computed_tokens` counts the
        tokens found.  Room for the whole prompt is taken at once, or promised.

        Returns:
            The entries gained, often none; None if too few blocks are available, and then nothing has changed.
        """
        if self._num_missing(request, request.num_computed_tokens) <= 0:
            return []
        hits = [] if request.block_ids else self._prefixes.find(request)
        num_found = len(hits) // self._num_groups * self._block_size
        num_computed = min(request.num_computed_tokens + num_found, request.num_tokens - 1)
        num_new = self._num_missing(request, num_computed) - len(hits)
        shared = [block_id for block_id in hits if block_id != UNSEEN]
        promise = self._needs(request, num_computed, len(shared) + num_new)
        num_taken = num_new + sum(map(self.pool.is_evictable, shared))
        if num_taken + promise > self.pool.num_available - self.num_promised + request.num_promised:
            return None
        self.pool.share(shared)
        gained = hits + self.pool.allocate(num_new)
        request.block_ids += gained
        request.num_computed_tokens = num_computed
        self._promise(request, promise)
        return gained

    def reserve_ahead(self, request: Request, num_tokens: int) -> list[int]:
        """Extend the block tables to reach up to `num_tokens` tokens beyond the known ones; returns the blocks gained.

        They reach no further than blocks are available, and no further than the request can become long.
        """
        most = min(request.num_tokens_with_spec + num_tokens, request.max_num_tokens)
        num_missing = -(-most // self._block_size) - len(request.block_ids) // self._num_groups
        num_rows = min(num_missing, (self.pool.num_available - self.num_promised) // self._num_groups)
        gained = self.pool.allocate(max(num_rows, 0) * self._num_groups)
        request.block_ids += gained
        return gained

    def advance(self, request: Request, num_computed_before: int) -> None:
        """Take note that `num_computed_tokens` was `num_computed_before`.

        Blocks that were filled can be found by others, and blocks that no query sees any more go back.
        """
        if num_computed_before // self._block_size < request.num_computed_tokens // self._block_size:
            self._prefixes.publish(request, num_computed_before)
        for number, group in self._windows:
            counts = num_computed_before, request.num_computed_tokens
            first, last = (group.num_unseen(count, self._block_size) for count in counts)
            if first < last:
                passed = slice(first * self._num_groups + number, last * self._num_groups + number, self._num_groups)
                self._release(request.block_ids[passed])
                request.block_ids[passed] = [UNSEEN] * (last - first)
                self._promise(request, self._needs(request, request.num_computed_tokens))

    def release(self, request: Request) -> None:
        """Take the request's blocks back.  Their content can be found until it is evicted."""
        self._release(request.block_ids)
        self._promise(request, 0)
        request.block_ids = []
        request.num_computed_tokens = 0

    def _num_missing(self, request: Request, num_computed: int) -> int:
        """Entries that the block tables lack for the step after `num_computed` tokens."""
        num_tokens = request.num_tokens_with_spec
        if self._windows:  # tables that give blocks back reach as far as the next step
            num_tokens = min(num_tokens, num_computed + self._config.max_chunk_tokens)
        return -(-num_tokens // self._block_size) * self._num_groups - len(request.block_ids)

    def _needs(self, request: Request, num_computed: int, num_gained: int = 0) -> int:
        """Blocks that the request needs beyond those it has and gains, until its known tokens are computed."""
        if not self._windows:
            return 0
        num_owned = len(request.block_ids) - request.block_ids.count(UNSEEN) + num_gained
        return max(0, self._config.most_blocks(request.num_tokens_with_spec, num_computed) - num_owned)

    def _promise(self, request: Request, num_blocks: int) -> None:
        self.num_promised += num_blocks - request.num_promised
        request.num_promised = num_blocks

    def _release(self, block_ids: list[int]) -> None:
        self.pool.release(block_id for block_id in reversed(block_ids) if block_id != UNSEEN)
