"""Drafting with a draft model: a small model with the target's tokenizer."""

from __future__ import annotations

import numpy as np

from shoal.model.speculation.config import MOST_SPEC_TOKENS
from shoal.model.speculation.drafting import Drafter
from shoal.model.speculation.proposer import NO_PROPOSAL, Candidate, Proposal
from shoal.model.step.batch import Backend
from shoal.model.step.rows import BatchRows
from shoal.scheduler.output import ScheduledRequest

# A draft model that lacks more tokens than this catches up first; fewer are read in the first step of drafting.
_READ_ALONG = MOST_SPEC_TOKENS


class DraftModelProposer(Drafter):
    """Implements `Proposer` with a draft model.

    The draft model has its own KV cache, in which each block has the same number as in the target's.  So a prefix that
    the target finds in its cache is there for the draft model too, as far as the draft model has read it.  It reads
    the tokens that it lacks before it drafts.

    Args:
        backend: the draft model's, with the target's number and size of blocks.
        rows: the batch; its block tables have one cache group, of which nothing is given back early.
        num_blocks: number of blocks of each KV cache.
        max_catch_up: most tokens to catch up with in one step, so that long prompts do not delay other requests.
        draws_apart: see `Drafter`.
    """

    def __init__(
        self, backend: Backend, rows: BatchRows, *, num_blocks: int, max_catch_up: int, draws_apart: bool
    ) -> None:
        super().__init__(backend, rows, num_layers=None, draws_apart=draws_apart)
        self._max_catch_up = max_catch_up
        self._num_read = [0] * rows.max_num_seqs  # by row: leading tokens with keys and values in the cache
        # By row: the number of tokens before the last draft, and the draft.
        self._drafted: list[tuple[int, list[int]]] = [(0, [])] * rows.max_num_seqs
        self._is_read = np.zeros(num_blocks, np.bool_)  # by block: whether the draft model has filled it

    def place(self, share: ScheduledRequest) -> None:
        row, fresh = share.row, share.new_block_ids
        if share.new:
            num_found = share.num_computed_tokens // self._rows.block_size  # blocks of the prefix cache
            found, fresh = self._is_read[fresh[:num_found]], fresh[num_found:]
            num_blocks = num_found if found.all() else int(found.argmin())
            self._num_read[row], self._drafted[row] = num_blocks * self._rows.block_size, (0, [])
        if fresh:
            self._is_read[fresh] = False

    def catch_up(self, candidates: list[Candidate]) -> None:
        parts: dict[int, tuple[int, int]] = {}
        budget = self._max_catch_up
        for one in candidates:
            start, end = self._start(one), one.num_tokens - 1
            if end - start > _READ_ALONG and budget:
                parts[one.row] = start, min(end, start + budget)
                budget -= parts[one.row][1] - start
        if parts:
            self.read(parts)
            for row, (_, end) in parts.items():
                self._note(row, end)

    def propose(self, candidates: list[Candidate]) -> dict[int, Proposal]:
        starts = {one.row: self._start(one) for one in candidates}
        ready = [one for one in candidates if one.num_tokens - 1 - starts[one.row] <= _READ_ALONG]
        proposals = dict.fromkeys(starts, NO_PROPOSAL)
        if ready:
            proposals |= self.draft(ready, starts)
            for one in ready:
                self._note(one.row, one.num_tokens)
                self._drafted[one.row] = one.num_tokens, proposals[one.row].token_ids
        return proposals

    def _start(self, candidate: Candidate) -> int:
        """Return the first token that the draft model must read; it has read its own drafted tokens but the last."""
        row = candidate.row
        num_known, drafted = self._drafted[row]
        read = self._num_read[row]
        if drafted and read == num_known:
            true = self._rows.token_ids[row, num_known : min(candidate.num_tokens - 1, num_known + len(drafted) - 1)]
            for token_id, expected in zip(true.tolist(), drafted, strict=False):
                if token_id != expected:
                    break
                read += 1
        return min(read, candidate.num_tokens - 1)

    def _note(self, row: int, num_read: int) -> None:
        """Take note that the first `num_read` tokens of the row are read."""
        size = self._rows.block_size
        self._is_read[self._rows.block_tables[row, self._num_read[row] // size : num_read // size]] = True
        self._num_read[row] = num_read
