"""What proposers that run a model have in common: batches of the last tokens of requests."""

from __future__ import annotations

import numpy as np

from shoal.model.backends.stepwise import draft_stepwise, known_tokens
from shoal.model.speculation.proposer import NO_PROPOSAL, Candidate, Float64, Proposal
from shoal.model.speculation.rejection import with_draft_noise
from shoal.model.step.batch import Backend, DraftBatch, ForwardBatch, Int32, SamplingBatch
from shoal.model.step.rows import BatchRows
from shoal.model.step.sampling import probabilities, sample_reference


class Drafter:
    """Has a backend guess behind the last tokens of requests.

    Args:
        backend: of the draft model, or the target's own.
        rows: the batch, whose block tables serve the draft's KV cache too.
        num_layers: of the backend's model to run before its norm and head; all of them if None.
        draws_apart: whether to draw with a noise of its own and tell the distributions drawn from, as rejection
            sampling needs; else the target's noise is used, so that equal distributions choose equal tokens.
    """

    def __init__(self, backend: Backend, rows: BatchRows, *, num_layers: int | None, draws_apart: bool) -> None:
        self._backend, self._rows = backend, rows
        self._num_layers, self._draws_apart = num_layers, draws_apart

    def read(self, places: list[int], starts: list[int], ends: list[int]) -> None:
        """Have the model take in the tokens from `starts` to `ends` of the requests in these rows."""
        step = known_tokens(self._batch(places, starts, ends, [1] * len(places)))
        step.logits_indices = step.logits_indices[:0]
        self._backend.forward(step, self._num_layers)

    def guess(self, candidates: list[Candidate], starts: list[int]) -> list[Proposal]:
        """Take in what the model lacks of the candidates' tokens, from `starts` on, and guess behind them."""
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
    """The tokens before the first that the model had no finite logits for."""
    return token_ids[: token_ids.index(-1)] if -1 in token_ids else token_ids
