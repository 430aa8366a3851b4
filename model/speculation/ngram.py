"""Prompt lookup: the last few tokens of a text are looked up in it, and what followed them before is drafted.

Saxena 2023, "Prompt Lookup Decoding".  It runs no model and keeps no index: the text is searched each time.
"""

from __future__ import annotations

from shoal.model.speculation.proposer import NO_PROPOSAL, Candidate, Proposal, Proposer
from shoal.model.step.rows import BatchRows

# Numbers of tokens that are looked up, most first.  The more of them match, the longer the texts after them agree.  So
# twice as many tokens are drafted as match, and as many as are wanted if the most match.
_SIZES = (8, 4, 3, 2)


class NgramProposer(Proposer):
    """Implements `Proposer` with the text of each request.

    Args:
        rows: the batch.
    """

    def __init__(self, rows: BatchRows) -> None:
        self._rows = rows

    def propose(self, candidates: list[Candidate]) -> dict[int, Proposal]:
        return {candidate.row: self._draft(candidate) for candidate in candidates}

    def _draft(self, candidate: Candidate) -> Proposal:
        """Return what followed the last earlier occurrence of the longest run at the end of the text."""
        token_ids = self._rows.token_ids[candidate.row, : candidate.num_tokens]
        text, token_size = token_ids.tobytes(), token_ids.itemsize
        for size in _SIZES:
            end = _end_before(text, size * token_size, token_size) // token_size
            if end > 0:
                count = candidate.num_wanted if size == _SIZES[0] else min(candidate.num_wanted, 2 * size)
                drafted: list[int] = token_ids[end : end + count].tolist()
                period = candidate.num_tokens - end
                while len(drafted) < count:  # the two runs overlap: the text repeats with this period
                    drafted.append(drafted[len(drafted) - period])
                return Proposal(drafted)
        return NO_PROPOSAL


def _end_before(text: bytes, num_bytes: int, token_size: int) -> int:
    """Return where the last earlier occurrence of the last `num_bytes` of the text ends; -1 if there is none."""
    run, start = text[-num_bytes:], len(text) - num_bytes
    while (start := text.rfind(run, 0, start + num_bytes - 1)) >= 0:
        if start % token_size == 0:
            return start + num_bytes
    return -1
