"""Prompt lookup: what followed the last few tokens when they stood in the text before will follow them again.

Saxena 2023, "Prompt Lookup Decoding".  No model is asked; each new token costs a few dictionary entries.
"""

from __future__ import annotations

from model.rows import BatchRows
from model.speculation.proposer import NO_PROPOSAL, Candidate, Proposal
from scheduler.output import ScheduledRequest

# Lengths of the runs of tokens that are looked up, longest first.
_SIZES = (4, 3, 2)


class NgramProposer:
    """Implements `Proposer` over the tokens of each request alone.

    Args:
        rows: the batch.
    """

    def __init__(self, rows: BatchRows) -> None:
        self._rows = rows
        self._index: dict[int, _Index] = {}

    def place(self, row: int, share: ScheduledRequest) -> None:
        if share.new:
            self._index[row] = _Index()

    def catch_up(self, candidates: list[Candidate]) -> None:
        for one in candidates:
            index = self._index[one.row]
            known = self._rows.token_ids[one.row, len(index.token_ids) : one.num_tokens]
            index.extend(known.tolist())

    def propose(self, candidates: list[Candidate]) -> list[Proposal]:
        return [self._guess(candidate) for candidate in candidates]

    def _guess(self, candidate: Candidate) -> Proposal:
        token_ids = self._index[candidate.row].follow(candidate.num_wanted)
        return Proposal(token_ids) if token_ids else NO_PROPOSAL


class _Index:
    """The tokens of one request, and where each short run of them last ended before the end."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    def extend(self, token_ids: list[int]) -> None:
        """Append known tokens; a run counts from the moment that a token follows it."""
        for token_id in token_ids:
            end = len(self.token_ids)
            for size in _SIZES:
                if end >= size:
                    self._ends[tuple(self.token_ids[end - size :])] = end
            self.token_ids.append(token_id)

    def follow(self, num_wanted: int) -> list[int]:
        """What followed the longest run at the end of the text when it stood before; a guess may go on from itself."""
        text = self.token_ids
        for size in _SIZES:
            start = self._ends.get(tuple(text[-size:])) if len(text) >= size else None
            if start is not None:
                period = len(text) - start
                guess = text[start : start + num_wanted]
                while len(guess) < num_wanted:  # the run overlaps the end: the text repeats with this period
                    guess.append(guess[len(guess) - period])
                return guess
        return []
