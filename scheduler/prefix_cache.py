"""Prefixes that are found again: full blocks by the hash of their content."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from operator import le

from shoal.scheduler.block_pool import BlockPool
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.output import SamplingParams
from shoal.scheduler.request import Request

_EMPTY = blake2b(digest_size=16)
UNSEEN = -1  # stands in a block table where no query sees a block any more


class PrefixCache:
    """Publishes the full blocks of requests in a `BlockPool`, and finds them for others.

    The hash of a block covers its tokens and the hash of the block before it, hence the whole prefix, the request's
    salt, and the cache group; 128 bits of BLAKE2b, so that no two prefixes meet by accident or by intent.
    """

    def __init__(self, pool: BlockPool, config: SchedulerConfig) -> None:
        self._pool, self._groups, self._block_size = pool, config.cache_groups, config.block_size
        self._is_enabled = config.enable_prefix_caching

    def publish(self, request: Request, num_computed_before: int) -> None:
        """Let other requests find the blocks that were filled since `num_computed_tokens` was `num_computed_before`."""
        first, last = num_computed_before // self._block_size, request.num_computed_tokens // self._block_size
        if self._is_enabled:
            self._hash_blocks(request, last)
            for index in range(first, last):
                for group in range(len(self._groups)):
                    block_id = request.block_ids[index * len(self._groups) + group]
                    self._pool.publish(block_id, _key(request.block_hashes[index], group))

    def find(self, request: Request) -> list[int]:
        """The block tables of the longest prefix of which all is cached that the query after it sees.

        At least one token is left to compute.  If it ends a block that is cached and that nobody owns, that block is
        found too: what is computed again is what stands there, to the bit.
        """
        if not (self._is_enabled and may_skip(request.params)):
            return []
        num_full = request.num_tokens // self._block_size
        self._hash_blocks(request, num_full)
        entries: list[int] = []
        gaps = [0] * len(self._groups)  # by group: leading blocks, up to the last one that is not cached
        longest, unseen = 0, gaps
        for count, content_hash in enumerate(request.block_hashes[:num_full], 1):
            for number in range(len(self._groups)):
                block_id = self._pool.find(_key(content_hash, number))
                if block_id is not None and count * self._block_size == request.num_tokens:
                    block_id = block_id if self._pool.is_evictable(block_id) else None
                entries.append(UNSEEN if block_id is None else block_id)
                gaps[number] = count if block_id is None else gaps[number]
            num_found = min(count * self._block_size, request.num_tokens - 1)
            firsts = [group.first_seen(num_found) // self._block_size for group in self._groups]
            if all(map(le, gaps, firsts)):
                longest, unseen = count, firsts
            elif any(gap and group.sees_all for gap, group in zip(gaps, self._groups, strict=True)):
                break
        return [
            entry if index // len(self._groups) >= unseen[index % len(self._groups)] else UNSEEN
            for index, entry in enumerate(entries[: longest * len(self._groups)])
        ]

    def _hash_blocks(self, request: Request, count: int) -> None:
        salt = request.scheduling.cache_salt
        extend_hashes(request.block_hashes, count, request.token_ids, salt, self._block_size)


def may_skip(params: SamplingParams) -> bool:
    """Whether tokens that are found in the cache need not be computed, since nothing that is asked for needs all."""
    return params.num_prompt_logprobs is None and (params.pooling is None or params.pooling.method == "last")


def extend_hashes(hashes: list[bytes], count: int, token_ids: Sequence[int], salt: str, block_size: int) -> None:
    """Have the hashes of a text's leading blocks reach to so many of them."""
    tokens = array("i", token_ids[len(hashes) * block_size : count * block_size])
    content_hash = hashes[-1] if hashes else salt.encode()
    for start in range(0, len(tokens), block_size):
        content = _EMPTY.copy()  # which takes half the time of a new one
        content.update(content_hash + tokens[start : start + block_size].tobytes())
        content_hash = content.digest()
        hashes.append(content_hash)


def _key(content_hash: bytes, group: int) -> bytes:
    return content_hash + group.to_bytes(2)
