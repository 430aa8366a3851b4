"""Blocks of the KV cache: which are owned, which can be found by content, and which is evicted next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Hands out block ids 0 to num_blocks - 1 with reference counts and finds blocks by the hash of their content.

    A block is in exactly one of three states, so that

        free + owned + evictable == num_blocks

    holds always: *free* blocks have no content worth finding, *owned* ones a reference count above zero (a shared
    block counts once), *evictable* ones no owner but content that a later request may still find.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._ref_counts = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._free) + len(self._evictable)

    @property
    def num_owned(self) -> int:
        return self.num_blocks - self.num_available

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` blocks without content, evicting the least recently released cached ones if it must.

        The caller has made sure that `count <= num_available`.
        """
        block_ids = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def find(self, content_hash: bytes) -> int | None:
        """The block with this content, if one is cached."""
        return self._block_of.get(content_hash)

    def is_evictable(self, block_id: int) -> bool:
        return block_id in self._evictable

    def share(self, block_ids: Iterable[int]) -> None:
        """Add an owner to each of these blocks, which `find` returned."""
        for block_id in block_ids:
            self._evictable.pop(block_id, None)
            self._ref_counts[block_id] += 1

    def publish(self, block_id: int, content_hash: bytes) -> None:
        """Let other requests find this owned block by its content.  A block known to have the same content stays."""
        if content_hash not in self._block_of:
            self._block_of[content_hash] = block_id
            self._hash_of[block_id] = content_hash

    def release(self, block_ids: Iterable[int]) -> None:
        """Take one owner from each of these blocks.

        Give a request's blocks last to first, so that the tail of a prefix is evicted before its head: a tail is found
        through its head only.
        """
        for block_id in block_ids:
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                if block_id in self._hash_of:
                    self._evictable[block_id] = None
                else:
                    self._free.append(block_id)

    def forget(self) -> None:
        """Let no content be found any more, whether its block has an owner or not."""
        self._free += self._evictable
        self._evictable.clear()
        self._hash_of.clear()
        self._block_of.clear()

    def check(self, owned: Iterable[list[int]]) -> None:
        """Assert the accounting against the block tables of all owners."""
        expected = [0] * self.num_blocks
        for block_ids in owned:
            for block_id in block_ids:
                expected[block_id] += 1
        assert expected == self._ref_counts, "reference counts differ from the block tables"
        num_owned = sum(count > 0 for count in expected)
        assert len(self._free) + num_owned + len(self._evictable) == self.num_blocks, "blocks leaked"
        unowned = {*self._free, *self._evictable}
        assert len(unowned) == self.num_blocks - num_owned, "a block is free twice"
        assert not any(expected[block_id] for block_id in unowned), "a free block has an owner"
        assert not any(block_id in self._hash_of for block_id in self._free), "a free block can be found"
        assert all(block_id in self._hash_of for block_id in self._evictable), "an evictable block cannot be found"
        assert {h: b for b, h in self._hash_of.items()} == self._block_of, "the two hash tables differ"

    def _evict(self) -> int:
        block_id, _ = self._evictable.popitem(last=False)
        del self._block_of[self._hash_of.pop(block_id)]
        return block_id
