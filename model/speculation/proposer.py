"""What every proposer can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.scheduler.output import ScheduledRequest

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request whose next tokens are to be guessed.

    Attributes:
        row: of the batch, where its tokens and its block table stand.
        num_tokens: known tokens, all of which the batch's rows hold.
        num_wanted: most tokens to propose, at least 1.
    """

    row: int
    num_tokens: int
    num_wanted: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """Guessed tokens.

    Attributes:
        token_ids: what may follow the known tokens; none if there is no guess.
        probabilities: [num_tokens, vocab_size], the distribution that each was drawn from; None if it was not drawn.
    """

    token_ids: list[int]
    probabilities: Float64 | None = None


NO_PROPOSAL = Proposal([])


class Proposer(Protocol):
    """Guesses what comes next."""

    def place(self, row: int, share: ScheduledRequest) -> None:
        """Take note of a share before its step is computed: who joins, and which blocks were gained."""
        ...

    def catch_up(self, candidates: list[Candidate]) -> None:
        """Do what guessing for these needs once, and not in every step."""
        ...

    def propose(self, candidates: list[Candidate]) -> list[Proposal]:
        """Guess for each candidate, behind its known tokens."""
        ...
