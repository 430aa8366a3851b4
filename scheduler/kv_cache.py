"""The KV cache as requests use it: block tables that grow, and prefixes that are found again."""

from __future__ import annotations

from array import array
from hashlib import blake2b

from shoal.scheduler.block_pool import BlockPool
from shoal.scheduler.request import Request


class KVCache:
    """Block tables over a `BlockPool`, with a content-hashed prefix cache.

    The hash of a full block covers its tokens and the hash of the block before it, hence the whole prefix, and the
    request's salt; 128 bits of BLAKE2b, so that no two prefixes meet by accident or by intent.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching

    def reserve(self, request: Request) -> list[int] | None:
        """Extend the block table to hold all tokens known of the request, drafted ones included.

        A request without blocks takes what the prefix cache holds of it first, and `num_computed_tokens` counts the
        tokens found.  Room for the whole prompt is taken at once, so that no two half-computed prompts can block
        each other.

        Returns:
            The blocks gained, often none; None if too few are available, and then nothing has changed.
        """
        num_missing = -(-request.num_tokens_with_spec // self.block_size) - len(request.block_ids)
        if num_missing <= 0:
            return []
        hits = [] if request.block_ids else self._find_prefix(request)
        num_new = num_missing - len(hits)
        if num_new > self.pool.num_available - sum(map(self.pool.is_evictable, hits)):
            return None
        self.pool.share(hits)
        gained = hits + self.pool.allocate(num_new)
        request.block_ids += gained
        request.num_computed_tokens += len(hits) * self.block_size
        return gained

    def reserve_ahead(self, request: Request, num_tokens: int) -> list[int]:
        """Extend the block table to reach up to `num_tokens` tokens beyond the known ones; returns the blocks gained.

        It reaches no further than blocks are available, and no further than the request can become long.
        """
        most = min(request.num_tokens_with_spec + num_tokens, request.max_num_tokens)
        num_missing = -(-most // self.block_size) - len(request.block_ids)
        if num_missing <= 0:
            return []
        gained = self.pool.allocate(min(num_missing, self.pool.num_available))
        request.block_ids += gained
        return gained

    def publish(self, request: Request, num_computed_before: int) -> None:
        """Let other requests find the blocks that were filled since `num_computed_tokens` was `num_computed_before`."""
        first, last = num_computed_before // self.block_size, request.num_computed_tokens // self.block_size
        if first < last and self.enable_prefix_caching:
            self._hash_blocks(request, last)
            for index in range(first, last):
                self.pool.publish(request.block_ids[index], request.block_hashes[index])

    def release(self, request: Request) -> None:
        """Take the request's blocks back.  Their content can be found until it is evicted."""
        self.pool.release(reversed(request.block_ids))
        request.block_ids = []
        request.num_computed_tokens = 0

    def _find_prefix(self, request: Request) -> list[int]:
        """The longest run of cached blocks that the request starts with; at least one token is left to compute."""
        params = request.params
        reads_all = params.num_prompt_logprobs is not None or (params.pooling and params.pooling.method != "last")
        if reads_all or not self.enable_prefix_caching:
            return []
        num_full = (request.num_tokens - 1) // self.block_size
        self._hash_blocks(request, num_full)
        hits: list[int] = []
        for content_hash in request.block_hashes[:num_full]:
            block_id = self.pool.find(content_hash)
            if block_id is None:
                break
            hits.append(block_id)
        return hits

    def _hash_blocks(self, request: Request, count: int) -> None:
        hashes, size = request.block_hashes, self.block_size
        for index in range(len(hashes), count):
            tokens = array("q", request.token_ids[index * size : (index + 1) * size]).tobytes()
            parent = hashes[-1] if hashes else request.scheduling.cache_salt.encode()
            hashes.append(blake2b(parent + tokens, digest_size=16).digest())
