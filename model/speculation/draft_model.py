"""Drafting with a draft model: a small model with the target's tokenizer."""

from __future__ import annotations

from shoal.model.speculation.config import MOST_SPEC_TOKENS
from shoal.model.speculation.drafting import Drafter
from shoal.model.speculation.proposer import NO_PROPOSAL, Candidate, Proposal
from shoal.model.speculation.reads import Reads
from shoal.model.step.batch import Backend
from shoal.model.step.rows import BatchRows
from shoal.scheduler.output import ScheduledRequest

# A draft model that lacks more tokens than this catches up first; fewer are read in the first step of drafting.
_READ_ALONG = MOST_SPEC_TOKENS


class DraftModelProposer(Drafter):
    """Implements `Proposer` with a draft model.

    The draft model has its own KV cache: see `Reads`.  It reads the tokens that it lacks before it drafts.

    Args:
        backend: the draft model's, with the target's number and size of blocks.
        rows, num_blocks: see `Reads`.
        max_catch_up: most tokens to catch up with in one step, so that long prompts do not delay other requests.
        draws_apart: see `Drafter`.
    """

    def __init__(
        self, backend: Backend, rows: BatchRows, *, num_blocks: int, max_catch_up: int, draws_apart: bool
    ) -> None:
        super().__init__(backend, rows, num_layers=None, draws_apart=draws_apart)
        self._max_catch_up = max_catch_up
        self._reads = Reads(rows, num_blocks)
        # By row: the number of tokens before the last draft, and the draft.
        self._drafted: list[tuple[int, list[int]]] = [(0, [])] * rows.max_num_seqs

    def place(self, share: ScheduledRequest) -> None:
        self._reads.place(share)
        if share.new:
            self._drafted[share.row] = 0, []

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
                self._reads.note(row, end)

    def propose(self, candidates: list[Candidate]) -> dict[int, Proposal]:
        starts = {one.row: self._start(one) for one in candidates}
        ready = [one for one in candidates if one.num_tokens - 1 - starts[one.row] <= _READ_ALONG]
        proposals = dict.fromkeys(starts, NO_PROPOSAL)
        if ready:
            proposals |= self.draft(ready, starts)
            for one in ready:
                self._reads.note(one.row, one.num_tokens)
                self._drafted[one.row] = one.num_tokens, proposals[one.row].token_ids
        return proposals

    def _start(self, candidate: Candidate) -> int:
        """Return the first token that the draft model must read; it has read its own drafted tokens but the last."""
        row = candidate.row
        num_known, drafted = self._drafted[row]
        read = self._reads.num_tokens[row]
        if drafted and read == num_known:
            true = self._rows.token_ids[row, num_known : min(candidate.num_tokens - 1, num_known + len(drafted) - 1)]
            for token_id, expected in zip(true.tolist(), drafted, strict=False):
                if token_id != expected:
                    break
                read += 1
        return min(read, candidate.num_tokens - 1)
