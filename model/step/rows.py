"""The requests in the batch, one row each: tokens, block table and sampling parameters, ready to be gathered."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.model.step.batch import BIAS, NO_BIASES, NO_PENALTIES, PENALTY, Int32, Records, SamplingBatch
from shoal.model.step.pooling import Pool
from shoal.model.step.sampling import SAMPLING_ROW, penalises_output, penalises_prompt, sampling_row
from shoal.scheduler.output import NewRequest, SamplingParams, ScheduledRequest

Bool = NDArray[np.bool_]
Intp = NDArray[np.intp]

_MOST_GATHERED = 8  # steps and proposals each ask for some


class BatchRows:
    """A table with a row for each request that is running; the scheduler says which.

    Attributes:
        max_num_seqs, block_size, num_groups: as given.
        token_ids: [max_num_seqs, max_model_len + 1] int32, known tokens and then drafted or freshly chosen ones.
        block_tables: [max_num_seqs, max_blocks * num_groups] int32; see `ForwardBatch`.
        num_prompt_tokens, num_logprobs: [max_num_seqs] int32; -1 for no log-probabilities.
        scored: by row, `num_prompt_logprobs` of those whose prompt's log-probabilities are asked for.
        pools: by row, of the prompts that become vectors.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, num_groups: int = 1) -> None:
        max_blocks = -(-max_model_len // block_size)
        self.max_num_seqs, self.block_size, self.num_groups = max_num_seqs, block_size, num_groups
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        self.block_tables = np.zeros((max_num_seqs, max_blocks * num_groups), np.int32)
        self.num_prompt_tokens = np.zeros(max_num_seqs, np.int32)
        self._sampling = np.zeros(max_num_seqs, SAMPLING_ROW)
        self.num_logprobs: Int32 = self._sampling["num_logprobs"]
        self._gathered: dict[tuple[bytes, bool], Records] = {}
        self.scored: dict[int, int] = {}
        self.pools: dict[int, Pool] = {}
        self._penalised: dict[int, Int32] = {}  # row -> prompt tokens that count as seen
        self._biased: dict[int, _Bias] = {}

    def place(self, share: ScheduledRequest) -> int:
        """Bring the request's row up to date with its share of the step; returns the row."""
        row = share.row
        if share.new:
            self._join(row, share.new)
        if share.new_block_ids:
            begin = share.num_blocks - len(share.new_block_ids)
            self.block_tables[row, begin : share.num_blocks] = share.new_block_ids
        if share.spec_token_ids:
            end = share.num_computed_tokens + share.num_scheduled_tokens
            self.token_ids[row, end - len(share.spec_token_ids) : end] = share.spec_token_ids
        return row

    def leave(self, row: int) -> None:
        """Forget the request in a row, if there is one."""
        self.scored.pop(row, None)
        self.pools.pop(row, None)
        self._penalised.pop(row, None)
        self._biased.pop(row, None)

    def sampling_batch(self, rows: Intp, positions: Int32, chooses: Bool, *, reports: bool = True) -> SamplingBatch:
        """How to choose the token at each of `positions` of the requests in `rows`, all [num_logits].

        Where `chooses` is false the token is known and is only scored.  Without `reports` no log-probabilities are
        asked for.  The batch is valid until the next call.
        """
        gathered = self._gather(rows, reports)
        if self.scored or self.pools:
            gathered = gathered.copy()
            known = np.flatnonzero(~chooses)
            gathered["forced_token_id"][known] = self.token_ids[rows[known], positions[known]]
            gathered["num_logprobs"][known] = [self.scored.get(row, -1) for row in rows[known].tolist()]
            gathered["logprob_token_ids"][known] = -1
        gathered["position"] = positions
        penalties = self._penalties(rows, positions, chooses) if self._penalised else NO_PENALTIES
        biases = self._biases(rows, positions, chooses) if self._biased else NO_BIASES
        return SamplingBatch(gathered, penalties, biases)

    def drafting_batch(self, rows: Int32, positions: Int32) -> SamplingBatch:
        """How to guess the token at each of `positions` of the requests in `rows`, both [num_logits]."""
        return self.sampling_batch(rows.astype(np.intp), positions, np.ones(len(rows), np.bool_), reports=False)

    def _gather(self, rows: Intp, reports: bool) -> Records:
        """The parameters of the rows; a batch that only decodes asks for the same rows in every step."""
        key = rows.tobytes(), reports
        gathered = self._gathered.get(key)
        if gathered is None:
            if len(self._gathered) == _MOST_GATHERED:
                self._gathered.clear()
            gathered = self._gathered[key] = self._sampling[rows]
            if not reports:
                gathered["num_logprobs"] = -1
        return gathered

    def _join(self, row: int, new: NewRequest) -> None:
        self.leave(row)  # a step that failed may have placed it before
        self._gathered.clear()
        params = new.params
        self.token_ids[row, : len(new.token_ids)] = new.token_ids
        self.num_prompt_tokens[row] = new.num_prompt_tokens
        self._sampling[row] = sampling_row(params)
        if params.num_prompt_logprobs is not None:
            self.scored[row] = params.num_prompt_logprobs
        if params.pooling is not None:
            self.pools[row] = Pool(params.pooling, new.num_prompt_tokens)
        if penalises_output(params):
            prompt = new.token_ids[: new.num_prompt_tokens] if penalises_prompt(params) else []
            self._penalised[row] = np.unique(np.array(prompt, np.int32))
        if params.logit_bias or (params.min_tokens and not params.grammar):  # a grammar's masks keep to min_tokens
            self._biased[row] = _Bias.of(params)

    def _penalties(self, rows: Intp, positions: Int32, chooses: Bool) -> Records:
        """The tokens seen before each choice, with how often each was generated: [any] PENALTY."""
        entries: list[Int32] = []
        for index in np.flatnonzero(chooses).tolist():
            row = int(rows[index])
            if row in self._penalised:
                output = self.token_ids[row, self.num_prompt_tokens[row] : positions[index]]
                seen, counts = np.unique(output, return_counts=True)
                prompt_only = np.setdiff1d(self._penalised[row], seen, assume_unique=True)
                columns = np.zeros((len(seen) + len(prompt_only), 3), np.int32)
                columns[:, 0] = index
                columns[: len(seen), 1], columns[len(seen) :, 1] = seen, prompt_only
                columns[: len(seen), 2] = counts
                entries.append(columns)
        return np.concatenate(entries).view(PENALTY)[:, 0] if entries else NO_PENALTIES

    def _biases(self, rows: Intp, positions: Int32, chooses: Bool) -> Records:
        """Addends to logits, [any] BIAS: `logit_bias`, and -inf for tokens that may not end the text yet."""
        indices: list[int] = []
        entries: list[Int32] = []
        for index in np.flatnonzero(chooses).tolist():
            row = int(rows[index])
            if row in self._biased:
                bias = self._biased[row]
                is_early = positions[index] - self.num_prompt_tokens[row] < bias.min_tokens
                indices.append(index)
                entries.append(bias.early if is_early else bias.late)
        if not entries:
            return NO_BIASES
        columns = np.concatenate(entries)
        columns[:, 0] = np.repeat(indices, [len(entry) for entry in entries])
        return columns.view(BIAS)[:, 0]


@dataclass(frozen=True, slots=True)
class _Bias:
    """A request's addends to logits: before it has `min_tokens` tokens, and from then on.

    Both are [any, 3] int32, BIAS with a column for each field, which numpy joins faster than records.
    """

    min_tokens: int
    early: Int32
    late: Int32

    @classmethod
    def of(cls, params: SamplingParams) -> _Bias:
        late = params.logit_bias
        early = late | dict.fromkeys(params.stop_token_ids, -np.inf)
        return cls(0 if params.grammar else params.min_tokens, _columns(early), _columns(late))


def _columns(addends: dict[int, float]) -> Int32:
    return np.array([(0, *one) for one in addends.items()], BIAS).view(np.int32).reshape(-1, 3)
