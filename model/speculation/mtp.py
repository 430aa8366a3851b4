"""Drafting with a module of multi-token prediction: see `Prediction`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from shoal.model.backends.stepwise import draft_stepwise
from shoal.model.numbers import Array, in_float32
from shoal.model.prediction import Prediction
from shoal.model.speculation.config import MOST_SPEC_TOKENS
from shoal.model.speculation.drafting import Drafter
from shoal.model.speculation.proposer import NO_PROPOSAL, Candidate, Proposal
from shoal.model.speculation.reads import Reads
from shoal.model.step.batch import Backend, DraftBatch, Float32, ForwardBatch, Int32, SamplingBatch
from shoal.model.step.rows import BatchRows
from shoal.scheduler.output import ScheduledRequest, StepResult

# States that wait for a proposal; if there are more, the module reads them without one.
_MOST_WAITING = MOST_SPEC_TOKENS


class MTPProposer(Drafter):
    """Implements `Proposer` with a module of multi-token prediction.

    The module reads a token together with the target's state before it, at that state's position: what it has read up
    to position p depends on the first p + 2 tokens.  States are there in the step that computes them and at no later
    time, so the module reads along with every request; of a prefix that the target finds and the module has not
    read, nothing is drafted.  To draft more than one token it goes on with its own states.

    The last position of a block in the prefix cache was read with the token that followed it first.  Another text with
    the block goes on with that; it makes a draft worse at most.

    Args:
        backend: of `prediction.model`, with the target's number and size of blocks.
        rows, num_blocks: see `Reads`.
        draws_apart: see `Drafter`.
    """

    def __init__(
        self, prediction: Prediction, backend: Backend, rows: BatchRows, *, num_blocks: int, draws_apart: bool
    ) -> None:
        super().__init__(backend, rows, num_layers=None, draws_apart=draws_apart)
        self._inputs, self._reads = _Inputs(prediction), Reads(rows, num_blocks)
        self._step: tuple[Float32, Int32] | None = None  # states of the step, and where those of each request begin
        self._waiting: dict[int, Float32] = {}  # by row, the target's states that follow what is read
        self._next = np.empty((0, 0), np.float32)  # states for the next step of the module

    def place(self, share: ScheduledRequest) -> None:
        self._reads.place(share)
        if share.new:
            self._waiting.pop(share.row, None)  # a step that failed may have left it

    def leave(self, row: int) -> None:
        if row in self._waiting:
            self._read([row])  # for those who find the blocks

    def prepare(self, batch: ForwardBatch) -> None:
        if batch.hidden is None:
            batch.hidden = np.empty((len(batch.token_ids), self._inputs.state_size), np.float32)
        self._step = batch.hidden, batch.query_start_loc

    def stepped(self, scheduled: list[ScheduledRequest], result: StepResult) -> None:
        assert self._step is not None
        hidden, starts = self._step
        self._read([row for row, states in self._waiting.items() if len(states) > _MOST_WAITING])
        for share, chosen, start in zip(scheduled, result.token_ids, starts[:-1].tolist(), strict=True):
            row = share.row
            if share.is_padding or share.request_id in result.errors:
                continue
            count = share.num_scheduled_tokens - len(share.spec_token_ids) + max(len(chosen) - 1, 0)
            known = self._waiting.get(row, hidden[:0])
            if self._reads.num_tokens[row] + len(known) == share.num_computed_tokens:
                self._waiting[row] = np.concatenate([known, hidden[start : start + count]])

    def propose(self, candidates: list[Candidate]) -> dict[int, Proposal]:
        ready = [one for one in candidates if one.row in self._waiting]
        proposals = dict.fromkeys((one.row for one in candidates), NO_PROPOSAL)
        if ready:
            proposals |= self.draft(ready, {one.row: self._reads.num_tokens[one.row] for one in ready})
            self._forget(one.row for one in ready)
        return proposals

    def _read(self, rows: list[int]) -> None:
        """Read the waiting states of the rows."""
        if rows:
            starts = {row: self._reads.num_tokens[row] for row in rows}
            self.read({row: (start, start + len(self._waiting[row]) + 1) for row, start in starts.items()})
            self._forget(rows)

    def _forget(self, rows: Iterable[int]) -> None:
        for row in rows:
            self._reads.note(row, self._reads.num_tokens[row] + len(self._waiting.pop(row)))

    def _batch(self, parts: list[tuple[int, int, int, int]]) -> DraftBatch:
        self._next = np.concatenate([self._waiting[row] for row, *_ in parts])
        batch = super()._batch(parts)
        batch.token_ids, batch.ends = batch.token_ids[:, 1:], batch.ends - 1
        return batch

    def _guess(self, batch: DraftBatch, sampling: SamplingBatch) -> Int32:
        def choose(step: ForwardBatch, how: SamplingBatch) -> Int32:
            self._give_inputs(step)
            chosen = self._backend.execute(step, how).token_ids
            self._take_states(step)
            return chosen

        return draft_stepwise(choose, batch, sampling)

    def _forward(self, step: ForwardBatch) -> Float32:
        self._give_inputs(step)
        logits = super()._forward(step)
        self._take_states(step)
        return logits

    def _give_inputs(self, step: ForwardBatch) -> None:
        step.inputs = self._inputs(step.token_ids, self._next[: len(step.token_ids)])
        if len(step.logits_indices):
            step.hidden = np.empty_like(step.inputs)

    def _take_states(self, step: ForwardBatch) -> None:
        if step.hidden is not None:
            self._next = self._inputs.feed_back(step.hidden[step.logits_indices])


class _Inputs:
    """What the module's first layer reads, in float32.

    Attributes:
        state_size: the target's hidden_size.
    """

    def __init__(self, prediction: Prediction) -> None:
        self.state_size = len(prediction.state_norm)
        self._embedding, self._eps = prediction.embedding, prediction.model.config.norm_eps
        self._gains = in_float32(prediction.token_norm), in_float32(prediction.state_norm)
        self._projection = in_float32(prediction.projection.weight).T
        self._feedback = None if prediction.feedback is None else in_float32(prediction.feedback.weight).T

    def __call__(self, token_ids: Int32, states: Float32) -> Float32:
        """[num_tokens, the module's hidden_size] of tokens and the states before them."""
        parts = in_float32(self._embedding[token_ids]), states
        normed = [self._norm(x, gain) for x, gain in zip(parts, self._gains, strict=True)]
        inputs: Float32 = np.concatenate(normed, axis=1) @ self._projection
        return inputs

    def feed_back(self, own: Float32) -> Float32:
        """The module's own states in place of the target's."""
        states: Float32 = own if self._feedback is None else own @ self._feedback
        return states

    def _norm(self, x: Array, gain: Array) -> Array:
        normed: Array = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + self._eps) * gain
        return normed
