"""What proposers that run a model have in common."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shoal.model.backends.stepwise import draft_stepwise, known_tokens
from shoal.model.speculation.proposer import Candidate, Float64, Proposal, Proposer
from shoal.model.speculation.rejection import with_draft_noise
from shoal.model.step.batch import Backend, DraftBatch, Float32, ForwardBatch, Int32, SamplingBatch
from shoal.model.step.rows import BatchRows
from shoal.model.step.sampling import probabilities, sample_reference


class Drafter(Proposer):
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

    def read(self, parts: Mapping[int, tuple[int, int]]) -> None:
        """Compute known tokens: `parts` says for each row of the batch from which to which."""
        step = known_tokens(self._batch([(row, start, end, 1) for row, (start, end) in parts.items()]))
        step.logits_indices = step.logits_indices[:0]
        self._forward(step)

    def draft(self, candidates: list[Candidate], starts: Mapping[int, int]) -> dict[int, Proposal]:
        """Compute each candidate's tokens from `starts[row]` on, and draft what may follow them."""
        ordered = sorted(candidates, key=lambda one: -one.num_wanted)
        batch = self._batch([(one.row, starts[one.row], one.num_tokens, one.num_wanted) for one in ordered])
        positions = np.array([one.num_tokens for one in ordered], np.int32)
        drafted = self._draft(batch, self._rows.drafting_batch(batch.rows, positions))
        return {one.row: proposal for one, proposal in zip(ordered, drafted, strict=True)}

    def _draft(self, batch: DraftBatch, sampling: SamplingBatch) -> list[Proposal]:
        wanted = batch.num_wanted.tolist()
        if not self._draws_apart:
            drafted = self._guess(batch, sampling).tolist()
            return [Proposal(_valid(row[:count])) for row, count in zip(drafted, wanted, strict=True)]
        distributions: list[Float64] = []

        def choose(step: ForwardBatch, how: SamplingBatch) -> Int32:
            logits = self._forward(step)
            distributions.append(probabilities(logits, how))
            return sample_reference(logits, with_draft_noise(how)).token_ids

        drafted = draft_stepwise(choose, batch, sampling).tolist()
        return [
            Proposal(_valid(row[:count]), np.stack([one[index] for one in distributions[:count]]))
            for index, (row, count) in enumerate(zip(drafted, wanted, strict=True))
        ]

    def _guess(self, batch: DraftBatch, sampling: SamplingBatch) -> Int32:
        """Do what `Backend.draft` does."""
        return self._backend.draft(batch, sampling, self._num_layers)

    def _forward(self, step: ForwardBatch) -> Float32:
        """Compute a step; returns the logits."""
        return self._backend.forward(step, self._num_layers)

    def _batch(self, parts: list[tuple[int, int, int, int]]) -> DraftBatch:
        """Each part is a row, the start and the end of the tokens to compute, and the number of tokens to guess."""
        rows, starts, ends, num_wanted = np.array([*zip(*parts, strict=True)], np.int32)
        table = self._rows
        tables = table.token_ids, table.block_tables, table.block_size, table.num_groups
        return DraftBatch(rows, starts, ends, num_wanted, *tables)


def _valid(token_ids: list[int]) -> list[int]:
    """Return the tokens before the first one for which the model had no finite logits."""
    return token_ids[: token_ids.index(-1)] if -1 in token_ids else token_ids
