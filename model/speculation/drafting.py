"""What proposers that run a model have in common."""

from __future__ import annotations

import numpy as np

from shoal.model.backends.stepwise import draft_stepwise, known_tokens
from shoal.model.speculation.proposer import NO_PROPOSAL, Candidate, Float64, Proposal
from shoal.model.speculation.rejection import with_draft_noise
from shoal.model.step.batch import Backend, DraftBatch, ForwardBatch, Int32, SamplingBatch
from shoal.model.step.rows import BatchRows
from shoal.model.step.sampling import probabilities, sample_reference


class Drafter:
    """Has a backend draft what may follow the last tokens of requests.

    Args:
        backend: the draft model's, or the target's.
        rows: the batch; its block tables serve the draft model's KV cache too.
        num_layers: number of layers to run before the norm and the head; None for all.
        draws_apart: whether to draw with a noise of its own and to return the distributions, as rejection sampling
            needs.  Else drafting uses the target's noise, so that equal distributions choose equal tokens.
    """

    def __init__(self, backend: Backend, rows: BatchRows, *, num_layers: int | None, draws_apart: bool) -> None:
        self._backend, self._rows = backend, rows
        self._num_layers, self._draws_apart = num_layers, draws_apart

    def read(self, places: list[int], starts: list[int], ends: list[int]) -> None:
        """Compute the tokens from `starts` to `ends` of the requests in these rows of the batch."""
        step = known_tokens(self._batch(places, starts, ends, [1] * len(places)))
        step.logits_indices = step.logits_indices[:0]
        self._backend.forward(step, self._num_layers)

    def draft(self, candidates: list[Candidate], starts: list[int]) -> list[Proposal]:
        """Compute the candidates' tokens from `starts` on, and draft what may follow them."""
        order = sorted(range(len(candidates)), key=lambda i: -candidates[i].num_wanted)
        ordered = [candidates[i] for i in order]
        wanted = [one.num_wanted for one in ordered]
        ends = [one.num_tokens for one in ordered]
        batch = self._batch([one.row for one in ordered], [starts[i] for i in order], ends, wanted)
        sampling = self._rows.drafting_batch(batch.rows, batch.ends)
        proposals = [NO_PROPOSAL] * len(candidates)
        for i, proposal in zip(order, self._draft(batch, sampling, wanted), strict=True):
            proposals[i] = proposal
        return proposals

    def _draft(self, batch: DraftBatch, sampling: SamplingBatch, wanted: list[int]) -> list[Proposal]:
        if not self._draws_apart:
            drafted = self._backend.draft(batch, sampling, self._num_layers).tolist()
            return [Proposal(_valid(row[:count])) for row, count in zip(drafted, wanted, strict=True)]
        distributions: list[Float64] = []

        def choose(step: ForwardBatch, how: SamplingBatch) -> Int32:
            logits = self._backend.forward(step, self._num_layers)
            distributions.append(probabilities(logits, how))
            return sample_reference(logits, with_draft_noise(how)).token_ids

        drafted = draft_stepwise(choose, batch, sampling).tolist()
        return [
            Proposal(_valid(row[:count]), np.stack([one[index] for one in distributions[:count]]))
            for index, (row, count) in enumerate(zip(drafted, wanted, strict=True))
        ]

    def _batch(self, places: list[int], starts: list[int], ends: list[int], wanted: list[int]) -> DraftBatch:
        columns = np.array([places, starts, ends, wanted], np.int32)
        rows = self._rows
        return DraftBatch(
            rows=columns[0],
            starts=columns[1],
            ends=columns[2],
            num_wanted=columns[3],
            token_ids=rows.token_ids,
            block_tables=rows.block_tables,
            block_size=rows.block_size,
        )


def _valid(token_ids: list[int]) -> list[int]:
    """Return the tokens before the first one for which the model had no finite logits."""
    return token_ids[: token_ids.index(-1)] if -1 in token_ids else token_ids
