"""The requests in the batch, one row each: tokens, block table and sampling parameters, ready to be gathered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.model.step.batch import Float32, Int32, SamplingBatch, UInt64
from shoal.scheduler.output import NewRequest, SamplingParams, ScheduledRequest

Bool = NDArray[np.bool_]
Intp = NDArray[np.intp]

_MOST_GATHERED = 8  # verifying and guessing each ask for some
_FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


class BatchRows:
    """A table with a row for each request that is running; the scheduler says which.

    Attributes:
        max_num_seqs, block_size: as given.
        token_ids: [max_num_seqs, max_model_len + 1] int32, known tokens and then drafted or freshly chosen ones.
        block_tables: [max_num_seqs, max_blocks] int32.
        num_prompt_tokens, num_logprobs, num_prompt_logprobs: [max_num_seqs] int32; -1 for no log-probabilities.
        scored: rows whose prompt's log-probabilities are asked for.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        max_blocks = -(-max_model_len // block_size)
        self.max_num_seqs, self.block_size = max_num_seqs, block_size
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        self.block_tables = np.zeros((max_num_seqs, max_blocks), np.int32)
        self.num_prompt_tokens = np.zeros(max_num_seqs, np.int32)
        self.num_logprobs = np.zeros(max_num_seqs, np.int32)
        self.num_prompt_logprobs = np.zeros(max_num_seqs, np.int32)
        self._floats = np.zeros((len(_FLOATS), max_num_seqs), np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int32)
        self._seeds = np.zeros(max_num_seqs, np.uint64)
        self._gathered: dict[bytes, tuple[tuple[Float32, ...], Int32, UInt64, Int32, Int32]] = {}
        self.scored: set[int] = set()
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
        self.scored.discard(row)
        self._penalised.pop(row, None)
        self._biased.pop(row, None)

    def sampling_batch(self, rows: Intp, positions: Int32, chooses: Bool) -> SamplingBatch:
        """How to choose the token at each of `positions` of the requests in `rows`, all [num_logits].

        Where `chooses` is false the token is known and is only scored.
        """
        floats, top_k, seeds, num_logprobs, forced = self._gather(rows)
        if self.scored:
            forced = np.where(chooses, forced, self.token_ids[rows, positions])
            num_logprobs = np.where(chooses, num_logprobs, self.num_prompt_logprobs[rows])
        penalties = self._penalties(rows, positions, chooses) if self._penalised else _NO_PENALTIES
        biases = self._biases(rows, positions, chooses) if self._biased else _NO_BIASES
        return SamplingBatch(
            temperature=floats[0],
            top_p=floats[1],
            min_p=floats[2],
            presence_penalty=floats[3],
            frequency_penalty=floats[4],
            repetition_penalty=floats[5],
            top_k=top_k,
            seeds=seeds,
            positions=positions.astype(np.int64),
            forced_token_ids=forced,
            num_logprobs=num_logprobs,
            penalty_rows=penalties[0],
            penalty_token_ids=penalties[1],
            penalty_counts=penalties[2],
            bias_rows=biases[0],
            bias_token_ids=biases[1],
            bias=biases[2],
        )

    def _gather(self, rows: Intp) -> tuple[tuple[Float32, ...], Int32, UInt64, Int32, Int32]:
        """The parameters of the rows; a batch that only decodes asks for the same rows in every step."""
        key = rows.tobytes()
        if key not in self._gathered:
            if len(self._gathered) == _MOST_GATHERED:
                self._gathered.clear()
            self._gathered[key] = (
                tuple(self._floats.take(rows, axis=1)),
                self._top_k[rows],
                self._seeds[rows],
                self.num_logprobs[rows],
                np.full(len(rows), -1, np.int32),
            )
        return self._gathered[key]

    def drafting_batch(self, rows: Int32, positions: Int32) -> SamplingBatch:
        """How to guess the token at each of `positions` of the requests in `rows`, both [num_logits]."""
        batch = self.sampling_batch(rows.astype(np.intp), positions, np.ones(len(rows), np.bool_))
        batch.num_logprobs = batch.forced_token_ids  # -1 each: nothing is forced, and nothing reported
        return batch

    def _join(self, row: int, new: NewRequest) -> None:
        self.leave(row)  # a step that failed may have placed it before
        self._gathered.clear()
        params = new.params
        self.token_ids[row, : len(new.token_ids)] = new.token_ids
        self.num_prompt_tokens[row] = new.num_prompt_tokens
        self.num_logprobs[row] = -1 if params.num_logprobs is None else params.num_logprobs
        self.num_prompt_logprobs[row] = -1 if params.num_prompt_logprobs is None else params.num_prompt_logprobs
        self._floats[:, row] = [getattr(params, name) for name in _FLOATS]
        self._top_k[row] = params.top_k
        self._seeds[row] = params.seed
        if params.num_prompt_logprobs is not None:
            self.scored.add(row)
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
            is_repetition = params.repetition_penalty != 1
            prompt = new.token_ids[: new.num_prompt_tokens] if is_repetition else []
            self._penalised[row] = np.unique(np.array(prompt, np.int32))
        if params.logit_bias or params.min_tokens:
            self._biased[row] = _Bias.of(params)

    def _penalties(self, rows: Intp, positions: Int32, chooses: Bool) -> tuple[Int32, Int32, Int32]:
        """Tokens seen before each choice: (logits row, token id, times generated); 0 times is of the prompt."""
        entries: list[tuple[NDArray[Any], ...]] = []
        for index in np.flatnonzero(chooses).tolist():
            row = int(rows[index])
            if row in self._penalised:
                output = self.token_ids[row, self.num_prompt_tokens[row] : positions[index]]
                seen, counts = np.unique(output, return_counts=True)
                prompt_only = np.setdiff1d(self._penalised[row], seen, assume_unique=True)
                token_ids = np.concatenate([seen, prompt_only])
                entries.append((np.full_like(token_ids, index), token_ids, np.pad(counts, (0, len(prompt_only)))))
        if not entries:
            return _NO_PENALTIES
        columns = [np.concatenate(column).astype(np.int32) for column in zip(*entries, strict=True)]
        return columns[0], columns[1], columns[2]

    def _biases(self, rows: Intp, positions: Int32, chooses: Bool) -> tuple[Int32, Int32, Float32]:
        """Addends to logits (logits row, token id, addend): `logit_bias`, and -inf for what may not end the text."""
        indices: list[int] = []
        entries: list[tuple[Int32, Float32]] = []
        for index in np.flatnonzero(chooses).tolist():
            row = int(rows[index])
            if row in self._biased:
                bias = self._biased[row]
                is_early = positions[index] - self.num_prompt_tokens[row] < bias.min_tokens
                indices.append(index)
                entries.append(bias.early if is_early else bias.late)
        if not entries:
            return _NO_BIASES
        token_ids, values = (np.concatenate(column) for column in zip(*entries, strict=True))
        counts = [len(token_ids) for token_ids, _ in entries]
        return np.repeat(np.array(indices, np.int32), counts), token_ids, values


@dataclass(frozen=True, slots=True)
class _Bias:
    """A request's addends to logits, (token ids, addends): before it has `min_tokens` tokens, and from then on."""

    min_tokens: int
    early: tuple[Int32, Float32]
    late: tuple[Int32, Float32]

    @classmethod
    def of(cls, params: SamplingParams) -> _Bias:
        late = params.logit_bias
        early = late | dict.fromkeys(params.stop_token_ids, -np.inf)
        return cls(params.min_tokens, _columns(early), _columns(late))


def _columns(addends: dict[int, float]) -> tuple[Int32, Float32]:
    return np.array(list(addends), np.int32), np.array(list(addends.values()), np.float32)


_EMPTY = np.empty(0, np.int32)
_NO_PENALTIES = (_EMPTY, _EMPTY, _EMPTY)
_NO_BIASES = (_EMPTY, _EMPTY, np.empty(0, np.float32))
