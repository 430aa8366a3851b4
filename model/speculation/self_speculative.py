"""Drafting with the target's own first layers, through its own norm and head.

Elhoushi et al. 2024, "LayerSkip"; it needs a model that was trained for it.  The keys and values of those layers are in
the target's KV cache already, so that there is nothing to catch up with.  Verification writes again what drafting
writes there.
"""

from __future__ import annotations

from shoal.model.speculation.drafting import Drafter
from shoal.model.speculation.proposer import Candidate, Proposal


class SelfSpeculativeProposer(Drafter):
    """Implements `Proposer` with the first layers of the target; `Drafter` says what the arguments are."""

    def propose(self, candidates: list[Candidate]) -> dict[int, Proposal]:
        return self.draft(candidates, {one.row: one.num_tokens - 1 for one in candidates})
