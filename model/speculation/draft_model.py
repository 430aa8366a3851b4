"""Guesses of a draft model: a small one with the target's tokenizer."""

from __future__ import annotations

import numpy as np

from shoal.model.speculation.drafting import Drafter
from shoal.model.speculation.length import MOST_SPEC_TOKENS
from shoal.model.speculation.proposer import NO_PROPOSAL, Candidate, Proposal
from shoal.model.step.batch import Backend
from shoal.model.step.rows import BatchRows
from shoal.scheduler.output import ScheduledRequest

# Tokens that are read with what a guess begins with; more are caught up with before.
_READ_ALONG = MOST_SPEC_TOKENS


class DraftModelProposer:
    """Implements `Proposer` with a model of its own.

    The draft has its own KV cache, in which a block has the number that it has in the target's.  So prefixes that the
    target finds in its cache are there for the draft too, as far as the draft has read them; what it lacks it reads
    before it guesses.

    Args:
        backend: of the draft model, with the target's number and size of blocks.
        rows: the batch.
        num_blocks: of either KV cache.
        max_catch_up: most tokens that are caught up with in a step, so that long prompts do not hold up the others.
        draws_apart: see `Drafter`.
    """

    def __init__(
        self,
        backend: Backend,
        rows: BatchRows,
        *,
        num_blocks: int,
        max_catch_up: int,
        draws_apart: bool,
    ) -> None:
        self._drafter = Drafter(backend, rows, num_layers=None, draws_apart=draws_apart)
        self._rows = rows
        self._max_catch_up = max_catch_up
        self._num_read = [0] * rows.max_num_seqs  # leading tokens of each row whose keys and values stand
        self._guessed: list[tuple[int, list[int]]] = [(0, [])] * rows.max_num_seqs  # behind how many tokens, and what
        self._is_read = np.zeros(num_blocks, np.bool_)  # blocks that the draft has filled, by number

    def place(self, row: int, share: ScheduledRequest) -> None:
        fresh = share.new_block_ids
        if share.new:
            num_found = share.num_computed_tokens // self._rows.block_size  # blocks of the prefix cache
            found, fresh = self._is_read[fresh[:num_found]], fresh[num_found:]
            num_blocks = num_found if found.all() else int(found.argmin())
            self._num_read[row], self._guessed[row] = num_blocks * self._rows.block_size, (0, [])
        if fresh:
            self._is_read[fresh] = False

    def catch_up(self, candidates: list[Candidate]) -> None:
        places, starts, ends = [], [], []
        budget = self._max_catch_up
        for one in candidates:
            start, end = self._start(one), one.num_tokens - 1
            if end - start > _READ_ALONG and budget:
                places.append(one.row)
                starts.append(start)
                ends.append(min(end, start + budget))
                budget -= ends[-1] - start
        if places:
            self._drafter.read(places, starts, ends)
            for place, end in zip(places, ends, strict=True):
                self._note(place, end)

    def propose(self, candidates: list[Candidate]) -> list[Proposal]:
        starts = [self._start(one) for one in candidates]
        ready = [i for i, one in enumerate(candidates) if one.num_tokens - 1 - starts[i] <= _READ_ALONG]
        proposals = [NO_PROPOSAL] * len(candidates)
        if ready:
            chosen = [candidates[i] for i in ready]
            guesses = self._drafter.guess(chosen, [starts[i] for i in ready])
            for i, one, proposal in zip(ready, chosen, guesses, strict=True):
                proposals[i] = proposal
                self._note(one.row, one.num_tokens)
                self._guessed[one.row] = one.num_tokens, proposal.token_ids
        return proposals

    def _start(self, candidate: Candidate) -> int:
        """The first token that the draft must read: it has read what it guessed itself, but for the last token."""
        row = candidate.row
        num_known, guess = self._guessed[row]
        read = self._num_read[row]
        if guess and read == num_known:
            true = self._rows.token_ids[row, num_known : min(candidate.num_tokens - 1, num_known + len(guess) - 1)]
            for token_id, guessed in zip(true.tolist(), guess, strict=False):
                if token_id != guessed:
                    break
                read += 1
        return min(read, candidate.num_tokens - 1)

    def _note(self, row: int, num_read: int) -> None:
        """The first `num_read` tokens of the row are read."""
        size = self._rows.block_size
        self._is_read[self._rows.block_tables[row, self._num_read[row] // size : num_read // size]] = True
        self._num_read[row] = num_read
