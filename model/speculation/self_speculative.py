"""Drafting with the target's own first layers, through its own norm and head.

Elhoushi et al. 2024, "LayerSkip"; it needs a model that was trained for it.  The keys and values of those layers are in
the target's KV cache already, so that there is nothing to catch up with.  Verification writes again what drafting
writes there.
"""

from __future__ import annotations

from shoal.model.speculation.drafting import Drafter
from shoal.model.speculation.proposer import Candidate, Proposal, Proposer
from shoal.model.step.batch import Backend
from shoal.model.step.rows import BatchRows


class SelfSpeculativeProposer(Proposer):
    """Implements `Proposer` with the first layers of the target.

    Args:
        backend: the target's.
        rows: the batch.
        num_layers: number of layers to draft with, from the first one on.
        draws_apart: see `Drafter`.
    """

    def __init__(self, backend: Backend, rows: BatchRows, *, num_layers: int, draws_apart: bool) -> None:
        self._drafter = Drafter(backend, rows, num_layers=num_layers, draws_apart=draws_apart)

    def propose(self, candidates: list[Candidate]) -> list[Proposal]:
        return self._drafter.draft(candidates, [one.num_tokens - 1 for one in candidates])
