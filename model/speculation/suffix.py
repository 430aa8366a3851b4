"""Suffix decoding: the last few tokens of a text are looked up, and what followed them before is drafted.

They are looked up in the text itself (Saxena 2023, "Prompt Lookup Decoding") and in the recent texts of other requests
(Oliaro et al. 2024, "SuffixDecoding"), of those alone that may find each other's prefixes too.  It runs no model.
"""

from __future__ import annotations

from shoal.model.speculation.proposer import NO_PROPOSAL, Candidate, Proposal, Proposer
from shoal.model.speculation.texts import SIZES, Texts
from shoal.model.step.rows import BatchRows
from shoal.scheduler.output import ScheduledRequest, StepResult

# Numbers of tokens that are looked up, most first.  The longer the run that is found, the longer the texts after it
# agree: as many tokens are drafted as are wanted if the most match, else twice as many as match, or as many as match if
# the text is another one, which agrees less.  A shorter run says too little of another text to be among `SIZES`.
_OWN_SIZES = (*SIZES, 3, 2)
_MOST_SALTS = 16  # whose texts are kept
_MANY_TOKENS = 64  # kept while their request still runs; what is left is kept when it leaves


class SuffixProposer(Proposer):
    """Implements `Proposer` with the texts of requests, those that have ended included.

    Args:
        rows: the batch.
    """

    def __init__(self, rows: BatchRows) -> None:
        self._rows = rows
        self._texts: dict[str, Texts] = {}  # by salt, those used last at the end
        self._of_row: dict[int, Texts] = {}  # by row
        self._num_tokens = [0] * rows.max_num_seqs  # by row, known ones
        self._num_kept = [0] * rows.max_num_seqs  # by row, of them, those found in the prefix cache included

    def place(self, share: ScheduledRequest) -> None:
        if share.new:
            salt = share.new.cache_salt
            self._of_row[share.row] = self._texts[salt] = self._texts.pop(salt) if salt in self._texts else Texts()
            if len(self._texts) > _MOST_SALTS:
                del self._texts[next(iter(self._texts))]
            self._num_tokens[share.row] = self._num_kept[share.row] = share.num_computed_tokens

    def stepped(self, scheduled: list[ScheduledRequest], result: StepResult) -> None:
        for share, chosen in zip(scheduled, result.token_ids, strict=True):
            if chosen:
                end = share.num_computed_tokens + share.num_scheduled_tokens
                self._num_tokens[share.row] = end - len(share.spec_token_ids) + len(chosen)
                if self._num_tokens[share.row] - self._num_kept[share.row] >= _MANY_TOKENS:
                    self._keep(share.row)

    def leave(self, row: int) -> None:
        if row in self._of_row:
            self._keep(row)
            del self._of_row[row]

    def propose(self, candidates: list[Candidate]) -> dict[int, Proposal]:
        return {candidate.row: self._draft(candidate) for candidate in candidates}

    def _keep(self, row: int) -> None:
        """Keep the tokens that are new, behind those that lead to them."""
        start, end = self._num_kept[row] - SIZES[0], self._num_tokens[row]
        if self._num_kept[row] < end:
            self._of_row[row].add(self._rows.token_ids[row, max(start, 0) : end])
            self._num_kept[row] = end

    def _draft(self, candidate: Candidate) -> Proposal:
        """Return what followed the longest run at the end of the text, where it last stood in it or in another one."""
        token_ids = self._rows.token_ids[candidate.row, : candidate.num_tokens]
        text, token_size = token_ids.tobytes(), token_ids.itemsize
        texts = self._of_row[candidate.row]
        others = texts.find(token_ids)
        for size in _OWN_SIZES:
            end = _end_before(text, size * token_size, token_size) // token_size
            if end > 0:
                count = candidate.num_wanted if size == SIZES[0] else min(candidate.num_wanted, 2 * size)
                drafted: list[int] = token_ids[end : end + count].tolist()
                period = candidate.num_tokens - end
                while len(drafted) < count:  # the two runs overlap: the text repeats with this period
                    drafted.append(drafted[len(drafted) - period])
                return Proposal(drafted)
            if size in others:
                count = candidate.num_wanted if size == SIZES[0] else min(candidate.num_wanted, size)
                return Proposal(texts.after(others[size], count))
        return NO_PROPOSAL


def _end_before(text: bytes, num_bytes: int, token_size: int) -> int:
    """Return where the last earlier occurrence of the last `num_bytes` of the text ends; -1 if there is none."""
    run, start = text[-num_bytes:], len(text) - num_bytes
    while (start := text.rfind(run, 0, start + num_bytes - 1)) >= 0:
        if start % token_size == 0:
            return start + num_bytes
    return -1
