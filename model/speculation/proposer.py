"""The interface of proposers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.model.step.batch import ForwardBatch
from shoal.scheduler.output import ScheduledRequest, StepResult

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request for which tokens are to be drafted.

    Attributes:
        row: the row of the batch that holds its tokens and its block table.
        num_tokens: number of known tokens; the row holds all of them.
        num_wanted: most tokens to draft, at least 1.
    """

    row: int
    num_tokens: int
    num_wanted: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafted tokens.

    Attributes:
        token_ids: what may follow the known tokens; empty if nothing was drafted.
        probabilities: [num_tokens, vocab_size], the distribution of each token's draw; None if none was drawn.
    """

    token_ids: list[int]
    probabilities: Float64 | None = None


NO_PROPOSAL = Proposal([])


class Proposer:
    """Drafts the next tokens of requests.  One that keeps nothing of its own inherits all but `propose`."""

    def place(self, share: ScheduledRequest) -> None:
        """Take note of a request's share of the next step: whether it joins, and its new blocks."""

    def prepare(self, batch: ForwardBatch) -> None:
        """Ask of the next step what drafting needs of it."""

    def stepped(self, scheduled: list[ScheduledRequest], result: StepResult) -> None:
        """Take note of the tokens that a step has chosen; the rows hold them."""

    def leave(self, row: int) -> None:
        """Take note that the request in the row, if there is one, leaves the batch."""

    def catch_up(self, candidates: list[Candidate]) -> None:
        """Do what drafting for these needs once, and not in every step."""

    def propose(self, candidates: list[Candidate]) -> dict[int, Proposal]:
        """Return a proposal for each candidate, by its row."""
        raise NotImplementedError
