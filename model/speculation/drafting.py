"""What proposers that run a model have in common: batches of the last tokens of requests."""

from __future__ import annotations

import numpy as np

from model.backends.stepwise import draft_stepwise
from model.batch import Backend, ForwardBatch, Int32, SamplingBatch
from model.rows import BatchRows
from model.sampling import probabilities, sample_reference
from model.speculation.proposer import NO_PROPOSAL, Candidate, Float64, Proposal
from model.speculation.rejection import with_draft_noise


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
        self._backend.forward(self._queries(places, starts, ends, num_logits=0, num_ahead=0), self._num_layers)

    def guess(self, candidates: list[Candidate], starts: list[int]) -> list[Proposal]:
        """Take in what the model lacks of the candidates' tokens, from `starts` on, and guess behind them."""
        order = sorted(range(len(candidates)), key=lambda i: -candidates[i].num_wanted)
        ordered = [candidates[i] for i in order]
        places, ends = [one.row for one in ordered], [one.num_tokens for one in ordered]
        num_wanted = np.array([one.num_wanted for one in ordered], np.int32)
        batch = self._queries(
            places, [starts[i] for i in order], ends, num_logits=len(order), num_ahead=int(num_wanted[0]) - 1
        )
        sampling = self._rows.drafting_batch(np.array(places), batch.context_lens)
        proposals = [NO_PROPOSAL] * len(candidates)
        for i, proposal in zip(order, self._draft(batch, sampling, num_wanted), strict=True):
            proposals[i] = proposal
        return proposals

    def _draft(self, batch: ForwardBatch, sampling: SamplingBatch, num_wanted: Int32) -> list[Proposal]:
        wanted = num_wanted.tolist()
        if not self._draws_apart:
            drafted = self._backend.draft(batch, sampling, num_wanted, self._num_layers).tolist()
            return [Proposal(_valid(row[:count])) for row, count in zip(drafted, wanted, strict=True)]
        distributions: list[Float64] = []

        def choose(step: ForwardBatch, how: SamplingBatch) -> Int32:
            logits = self._backend.forward(step, self._num_layers)
            distributions.append(probabilities(logits, how))
            return sample_reference(logits, with_draft_noise(how)).token_ids

        drafted = draft_stepwise(choose, batch, sampling, num_wanted, self._rows.block_size).tolist()
        return [
            Proposal(_valid(row[:count]), np.stack([one[index] for one in distributions[:count]]))
            for index, (row, count) in enumerate(zip(drafted, wanted, strict=True))
        ]

    def _queries(
        self, places: list[int], starts: list[int], ends: list[int], *, num_logits: int, num_ahead: int
    ) -> ForwardBatch:
        """A step over the tokens `starts` to `ends` of these rows; the logits of the first `num_logits` rows' last
        tokens are needed, and block tables reach `num_ahead` tokens further."""
        rows, size = self._rows, self._rows.block_size
        counts = np.array(ends, np.int32) - np.array(starts, np.int32)
        query_start_loc = np.zeros(len(places) + 1, np.int32)
        np.cumsum(counts, out=query_start_loc[1:])
        # Each token's place in its request's share, and from there its position.
        offsets = np.arange(query_start_loc[-1], dtype=np.int32) - np.repeat(query_start_loc[:-1], counts)
        positions = np.repeat(np.array(starts, np.int32), counts) + offsets
        token_rows = np.repeat(np.array(places), counts)
        block_index, offset = np.divmod(positions, size)
        return ForwardBatch(
            token_ids=rows.token_ids[token_rows, positions],
            positions=positions,
            slot_mapping=rows.block_tables[token_rows, block_index] * size + offset,
            query_start_loc=query_start_loc,
            context_lens=np.array(ends, np.int32),
            block_tables=rows.block_tables[places, : -(-(max(ends) + num_ahead) // size)],
            logits_indices=query_start_loc[1 : num_logits + 1] - np.int32(1),
        )


def _valid(token_ids: list[int]) -> list[int]:
    """The tokens before the first that the model had no finite logits for."""
    return token_ids[: token_ids.index(-1)] if -1 in token_ids else token_ids
