"""Turns a schedule into arrays, has a backend compute them, and reads off what was chosen."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.batch import Backend, ForwardBatch, Int32, SamplerOutput
from model.rows import BatchRows
from scheduler.output import ScheduledRequest, SchedulerOutput, StepResult, TokenLogprobs


class _Layout(NamedTuple):
    """Where a step's tokens and logits come from.

    Attributes:
        num_logits: [num_seqs], logits rows of each; they belong to the last tokens of its share.
        logits_rows: [num_logits in all], the batch row of each logits row.
        logits_positions: [num_logits in all], position of the token that each predicts.
        chooses: [num_logits in all], whether that token is to be chosen, or is known and to be scored.
    """

    num_logits: Int32
    logits_rows: Int32
    logits_positions: Int32
    chooses: NDArray[np.bool_]


class ModelExecutor:
    """Executes schedules on a backend.  It keeps the tokens, block tables and sampling parameters of the requests in
    the batch (`BatchRows`); everything else is computed anew from the schedule in each step.

    Args:
        max_num_seqs, max_model_len: the scheduler's limits.
        block_size: tokens per block of the KV cache.
    """

    def __init__(self, backend: Backend, *, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self.backend = backend
        self.block_size = block_size
        self.rows = BatchRows(max_num_seqs, max_model_len, block_size)

    def execute(self, output: SchedulerOutput) -> StepResult:
        """Compute a step.  See `scheduler.engine.Executor`."""
        for request_id in output.released:
            self.rows.leave(request_id)
        if not output.scheduled:
            return StepResult([])
        batch, layout = self._build(output.scheduled)
        sampling = self.rows.sampling_batch(layout.logits_rows, layout.logits_positions, layout.chooses)
        chosen = self.backend.execute(batch, sampling)
        self.rows.token_ids[layout.logits_rows, layout.logits_positions] = chosen.token_ids
        return self._collect(output.scheduled, layout, chosen)

    def _build(self, scheduled: list[ScheduledRequest]) -> tuple[ForwardBatch, _Layout]:
        rows = np.array([self.rows.place(share) for share in scheduled], np.int32)
        starts = np.array([share.num_computed_tokens for share in scheduled], np.int32)
        counts = np.array([share.num_scheduled_tokens for share in scheduled], np.int32)
        ends = counts.cumsum(dtype=np.int32)

        token_rows, positions = _ranges(rows, starts, counts, ends)
        num_chosen = np.array([len(s.spec_token_ids) + 1 if s.samples else 0 for s in scheduled], np.int32)
        num_logits = np.where(self._scores_prompt(rows, starts), counts, num_chosen) if self.rows.scored else num_chosen
        logits_rows, logits_indices = _ranges(rows, ends - num_logits, num_logits, num_logits.cumsum(dtype=np.int32))
        chooses = logits_indices >= np.repeat(ends - num_chosen, num_logits)

        context_lens = starts + counts
        max_blocks = -(-int(context_lens.max()) // self.block_size)
        block_index, offset = np.divmod(positions, self.block_size)
        block_ids = self.rows.block_tables[token_rows, block_index]
        query_start_loc = np.zeros(len(scheduled) + 1, np.int32)
        query_start_loc[1:] = ends
        batch = ForwardBatch(
            token_ids=self.rows.token_ids[token_rows, positions],
            positions=positions,
            slot_mapping=block_ids * self.block_size + offset,
            query_start_loc=query_start_loc,
            context_lens=context_lens,
            block_tables=self.rows.block_tables[rows, :max_blocks],
            logits_indices=logits_indices,
        )
        return batch, _Layout(num_logits, logits_rows, positions[logits_indices] + 1, chooses)

    def _scores_prompt(self, rows: Int32, starts: Int32) -> NDArray[np.bool_]:
        """Which shares score prompt tokens, and so need logits for all of theirs: [num_seqs]."""
        is_asked = self.rows.num_prompt_logprobs[rows] >= 0
        return is_asked & (starts + 1 < self.rows.num_prompt_tokens[rows])

    def _collect(self, scheduled: list[ScheduledRequest], layout: _Layout, chosen: SamplerOutput) -> StepResult:
        """Split what was chosen by request, and verify drafted tokens."""
        result = StepResult([])
        token_ids: list[int] = chosen.token_ids.tolist()
        end = 0
        for share, num_logits in zip(scheduled, layout.num_logits.tolist(), strict=True):
            begin, end = end, end + num_logits
            first = end - len(share.spec_token_ids) - 1 if share.samples else end
            accepted = _verify(share.spec_token_ids, token_ids[first:end])
            result.token_ids.append(accepted)
            if num_logits and -1 in token_ids[begin:end]:
                result.errors[share.request_id] = "the model computed logits that are not finite numbers"
            elif chosen.logprobs is not None:
                self._add_logprobs(result, share, chosen, slice(begin, first), slice(first, first + len(accepted)))
        return result

    def _add_logprobs(
        self, result: StepResult, share: ScheduledRequest, chosen: SamplerOutput, prompt: slice, output: slice
    ) -> None:
        row = self.rows.row_of[share.request_id]
        num_logprobs, num_prompt_logprobs = self.rows.num_logprobs[row], self.rows.num_prompt_logprobs[row]
        if num_logprobs >= 0 and output.stop > output.start:
            result.logprobs[share.request_id] = _read_logprobs(chosen, output, num_logprobs)
        # The logits of the prompt's last token choose, and score nothing.
        num_scored = self.rows.num_prompt_tokens[row] - 1 - share.num_computed_tokens
        scored = slice(prompt.start, min(prompt.stop, prompt.start + num_scored))
        if num_prompt_logprobs >= 0 and scored.stop > scored.start:
            result.prompt_logprobs[share.request_id] = _read_logprobs(chosen, scored, num_prompt_logprobs)


def _ranges(rows: Int32, starts: Int32, counts: Int32, ends: Int32) -> tuple[Int32, Int32]:
    """Concatenated ranges [starts, starts + counts), each value beside its row; `ends` is the running sum of counts."""
    if (counts == 1).all():
        return rows, starts
    shift = starts - ends + counts
    values = np.arange(ends[-1], dtype=np.int32) + np.repeat(shift, counts)
    return np.repeat(rows, counts), values


def _verify(spec_token_ids: list[int], chosen: list[int]) -> list[int]:
    """The drafted tokens that are what the target chooses, and the one token more that it chooses after them."""
    for index, drafted in enumerate(spec_token_ids):
        if drafted != chosen[index]:
            return chosen[: index + 1]
    return chosen


def _read_logprobs(chosen: SamplerOutput, entries: slice, count: int) -> list[TokenLogprobs]:
    assert chosen.logprobs is not None
    assert chosen.ranks is not None
    assert chosen.top_token_ids is not None
    assert chosen.top_logprobs is not None
    columns: tuple[NDArray[np.float32], Int32, Int32, NDArray[np.float32]] = (
        chosen.logprobs[entries],
        chosen.ranks[entries],
        chosen.top_token_ids[entries, :count],
        chosen.top_logprobs[entries, :count],
    )
    return [TokenLogprobs(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]
