"""How far a model with a KV cache of its own has read the texts of the batch."""

from __future__ import annotations

import numpy as np

from shoal.model.step.rows import BatchRows
from shoal.scheduler.output import ScheduledRequest


class Reads:
    """Leading tokens with keys and values in that cache, in which each block has the same number as in the target's.

    So a prefix that the target finds in its cache is there too, as far as it has been read.

    Args:
        rows: the batch; its block tables have one cache group, of which nothing is given back early.
        num_blocks: number of blocks of each KV cache.

    Attributes:
        num_tokens: by row.
    """

    def __init__(self, rows: BatchRows, num_blocks: int) -> None:
        self._rows = rows
        self.num_tokens = [0] * rows.max_num_seqs
        self._is_read = np.zeros(num_blocks, np.bool_)  # by block: whether it is filled

    def place(self, share: ScheduledRequest) -> None:
        """Take note of a request's share of the next step, in which it joins or gets blocks."""
        fresh = share.new_block_ids
        if share.new:
            num_found = -(-share.num_computed_tokens // self._rows.block_size)  # blocks of the prefix cache
            found, fresh = self._is_read[fresh[:num_found]], fresh[num_found:]
            num_blocks = num_found if found.all() else int(found.argmin())
            self.num_tokens[share.row] = min(num_blocks * self._rows.block_size, share.num_computed_tokens)
        if fresh:
            self._is_read[fresh] = False

    def note(self, row: int, num_tokens: int) -> None:
        """Take note that the first `num_tokens` tokens of the row are read."""
        size = self._rows.block_size
        self._is_read[self._rows.block_tables[row, self.num_tokens[row] // size : num_tokens // size]] = True
        self.num_tokens[row] = num_tokens
