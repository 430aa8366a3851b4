"""Prompt lookup: what followed the last few tokens when they stood in the text before will follow them again.

Saxena 2023, "Prompt Lookup Decoding".  No model is asked, and nothing is kept: the text is searched each time.
"""

from __future__ import annotations

from shoal.model.speculation.proposer import NO_PROPOSAL, Candidate, Proposal
from shoal.model.step.rows import BatchRows
from shoal.scheduler.output import ScheduledRequest

# Lengths of the runs of tokens that are looked up, longest first.  What stood behind a short run comes again for a few
# tokens: twice as many as the run has are guessed, and behind the longest all that are wanted.
_SIZES = (8, 4, 3, 2)


class NgramProposer:
    """Implements `Proposer` over the tokens of each request alone.

    Args:
        rows: the batch.
    """

    def __init__(self, rows: BatchRows) -> None:
        self._rows = rows

    def place(self, row: int, share: ScheduledRequest) -> None:
        pass

    def catch_up(self, candidates: list[Candidate]) -> None:
        pass

    def propose(self, candidates: list[Candidate]) -> list[Proposal]:
        return [self._guess(candidate) for candidate in candidates]

    def _guess(self, candidate: Candidate) -> Proposal:
        """What followed the longest run at the end of the text when it stood last; a guess may go on from itself."""
        token_ids = self._rows.token_ids[candidate.row, : candidate.num_tokens]
        text, token_size = token_ids.tobytes(), token_ids.itemsize
        for size in _SIZES:
            end = _end_before(text, size * token_size, token_size) // token_size
            if end > 0:
                count = candidate.num_wanted if size == _SIZES[0] else min(candidate.num_wanted, 2 * size)
                guess: list[int] = token_ids[end : end + count].tolist()
                period = candidate.num_tokens - end
                while len(guess) < count:  # the run overlaps the end: the text repeats with this period
                    guess.append(guess[len(guess) - period])
                return Proposal(guess)
        return NO_PROPOSAL


def _end_before(text: bytes, num_bytes: int, token_size: int) -> int:
    """Where the last `num_bytes` of the text end when they stand in it before, the last time; -1 if they do not."""
    run, start = text[-num_bytes:], len(text) - num_bytes
    while (start := text.rfind(run, 0, start + num_bytes - 1)) >= 0:
        if start % token_size == 0:
            return start + num_bytes
    return -1
