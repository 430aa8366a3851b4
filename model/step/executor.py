"""Turns a schedule into arrays, has a backend compute them, and makes a result of the chosen tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from shoal.model.speculation.drafts import Drafts
from shoal.model.step.batch import Backend, ForwardBatch, SamplerOutput, find_slots
from shoal.model.step.layout import StepLayout
from shoal.model.step.pooling import pool_all
from shoal.model.step.rows import BatchRows
from shoal.scheduler.output import FinishReason, ScheduledRequest, SchedulerOutput, StepResult, TokenLogprobs


class ModelExecutor:
    """Executes schedules on a backend.

    It keeps the tokens, block tables and sampling parameters of the requests in the batch (`BatchRows`).  Everything
    else is computed from the schedule in each step.

    Args:
        max_num_seqs, max_model_len: the scheduler's limits.
        block_size: tokens per block of the KV cache.
        num_groups: cache groups of the model, each with a block table of its own.
        speculate: makes what proposes tokens for the requests in the rows; None for nothing.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        num_groups: int = 1,
        speculate: Callable[[BatchRows], Drafts] | None = None,
    ) -> None:
        self.backend = backend
        self.rows = BatchRows(max_num_seqs, max_model_len, block_size, num_groups)
        self._speculation = speculate(self.rows) if speculate else None
        # A batch that only decodes has the same layout in every step; with speculation it has one of a few.
        self._layouts: deque[tuple[tuple[list[int], ...], StepLayout]] = deque(maxlen=4)

    def execute(self, output: SchedulerOutput) -> StepResult:
        """Compute a step.  See `shoal.scheduler.engine.Executor`."""
        for row in output.released:
            self.rows.leave(row)
            if self._speculation is not None:
                self._speculation.leave(row)
        if not output.scheduled:
            return StepResult([])
        batch, layout = self._build(output.scheduled)
        positions = batch.positions[layout.logits_indices] + 1
        sampling = self.rows.sampling_batch(layout.logits_rows, positions, layout.chooses)
        if self._speculation is None:
            chosen = self.backend.execute(batch, sampling)
        else:
            chosen = self._speculation.execute(self.backend, batch, sampling, output.scheduled, layout)
        self.rows.token_ids[layout.logits_rows, positions] = chosen.token_ids
        result = self._collect(output.scheduled, layout, chosen)
        if batch.hidden is not None and self.rows.pools:
            states = batch.hidden[layout.logits_indices]
            result.embeddings = pool_all(self.rows.pools, output.scheduled, layout.num_logits, states)
        if self._speculation is not None:
            result.spec_token_ids = self._speculation.propose(output.scheduled, result)
        return result

    def _build(self, scheduled: list[ScheduledRequest]) -> tuple[ForwardBatch, StepLayout]:
        rows = [self.rows.place(share) for share in scheduled]
        if self._speculation is not None:
            for share in scheduled:
                if share.new_block_ids or share.new:
                    self._speculation.place(share)
        counts = [share.num_scheduled_tokens for share in scheduled]
        num_chosen = [len(share.spec_token_ids) + 1 if share.samples else 0 for share in scheduled]
        num_logits = num_chosen
        if self.rows.scored or self.rows.pools:
            num_logits = [self._num_logits(share, num) for share, num in zip(scheduled, num_chosen, strict=True)]
        layout = self._layout(rows, counts, num_chosen, num_logits)

        starts = np.array([share.num_computed_tokens for share in scheduled], np.int32)
        context_lens = starts + layout.counts
        positions = starts[layout.sequences] + layout.offsets
        block_tables, block_size, num_groups = self.rows.block_tables, self.rows.block_size, self.rows.num_groups
        max_blocks = (context_lens.max() - 1) // block_size + 1
        batch = ForwardBatch(
            token_ids=self.rows.token_ids[layout.token_rows, positions],
            positions=positions,
            slot_mapping=find_slots(block_tables, layout.token_rows, positions, block_size, num_groups),
            query_start_loc=layout.query_start_loc,
            context_lens=context_lens,
            block_tables=block_tables[layout.rows, : max_blocks * num_groups],
            logits_indices=layout.logits_indices,
        )
        if self.rows.pools:
            batch.hidden = np.empty((len(positions), self.backend.hidden_size), np.float32)
        return batch, layout

    def _num_logits(self, share: ScheduledRequest, num_chosen: int) -> int:
        """Rows of logits: of all tokens if the share scores the prompt, of those that are pooled or that choose."""
        row, start, count = share.row, share.num_computed_tokens, share.num_scheduled_tokens
        if row in self.rows.pools:
            return self.rows.pools[row].num_states(start, count)
        return count if row in self.rows.scored and start + 1 < self.rows.num_prompt_tokens[row] else num_chosen

    def _layout(self, *key: list[int]) -> StepLayout:
        """What `StepLayout.of` says of these arguments."""
        for known, layout in self._layouts:
            if known == key:
                return layout
        self._layouts.appendleft((key, StepLayout.of(*key)))
        return self._layouts[0][1]

    def _collect(self, scheduled: list[ScheduledRequest], layout: StepLayout, chosen: SamplerOutput) -> StepResult:
        """Divide the chosen tokens among the requests, and verify drafted tokens."""
        result = StepResult([])
        token_ids: list[int] = chosen.token_ids.tolist()
        end = 0
        for share, num_logits in zip(scheduled, layout.num_logits, strict=True):
            begin, end = end, end + num_logits
            first = end - len(share.spec_token_ids) - 1 if share.samples else end
            accepted = _verify(share.spec_token_ids, token_ids[first:end])
            result.token_ids.append(accepted)
            if -1 in accepted or -1 in token_ids[begin:first]:
                message = "the logits are not finite numbers, or no token may be chosen"
                result.errors[share.request_id] = FinishReason.ERROR, message
            elif chosen.logprobs is not None:
                self._add_logprobs(result, share, chosen, slice(begin, first), slice(first, first + len(accepted)))
        return result

    def _add_logprobs(
        self, result: StepResult, share: ScheduledRequest, chosen: SamplerOutput, prompt: slice, output: slice
    ) -> None:
        row, num_logprobs = share.row, self.rows.num_logprobs[share.row]
        if num_logprobs >= 0 and output.stop > output.start:
            result.logprobs[share.request_id] = _read_logprobs(chosen, output, num_logprobs)
        # The logits of the prompt's last token choose the first output token, and score nothing.
        num_scored = self.rows.num_prompt_tokens[row] - 1 - share.num_computed_tokens
        scored = slice(prompt.start, min(prompt.stop, prompt.start + num_scored))
        if row in self.rows.scored and scored.stop > scored.start:
            result.prompt_logprobs[share.request_id] = _read_logprobs(chosen, scored, self.rows.scored[row])


def _verify(spec_token_ids: list[int], chosen: list[int]) -> list[int]:
    """The drafted tokens that equal the target's choices, and the token that the target chooses after them."""
    for index, drafted in enumerate(spec_token_ids):
        if drafted != chosen[index]:
            return chosen[: index + 1]
    return chosen


def _read_logprobs(chosen: SamplerOutput, entries: slice, count: int) -> list[TokenLogprobs]:
    columns: list[Any] = [chosen.logprobs, chosen.ranks, chosen.top_token_ids, chosen.top_logprobs]
    rows = zip(*(column[entries].tolist() for column in columns), strict=True)
    return [TokenLogprobs(logprob, rank, ids[:count], logprobs[:count]) for logprob, rank, ids, logprobs in rows]
