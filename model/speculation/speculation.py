"""What the executor knows of speculation: propose after a step, verify in the next."""

from __future__ import annotations

import time
from collections.abc import Callable

from shoal.model.speculation import rejection
from shoal.model.speculation.length import LengthRule
from shoal.model.speculation.proposer import Candidate, Proposal, Proposer
from shoal.model.step.batch import Backend, Float32, ForwardBatch, SamplerOutput, SamplingBatch
from shoal.model.step.layout import StepLayout
from shoal.model.step.rows import BatchRows
from shoal.model.step.sampling import describe, probabilities, sample_reference
from shoal.scheduler.output import ScheduledRequest, StepResult

# A longer gap between two steps, in seconds, is an idle engine's; a shorter one counts as work for the second step.
_LONGEST_GAP = 2e-3


class Speculation:
    """Proposes tokens for the requests of a batch: as many as the length rule says, and as they have room for.

    Args:
        proposer: drafts the tokens.
        lengths: says how many.
        rows: the batch.
        needs_slots: whether drafting writes to the KV cache, so that it can reach no further than the block table.
        by_rejection: whether drafted tokens are verified by rejection sampling; else by comparison.
        clock: returns seconds; steps and proposals are timed by it.
    """

    def __init__(
        self,
        proposer: Proposer,
        lengths: LengthRule,
        rows: BatchRows,
        *,
        needs_slots: bool,
        by_rejection: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._proposer, self._lengths, self._rows = proposer, lengths, rows
        self._needs_slots, self._by_rejection, self._clock = needs_slots, by_rejection, clock
        self._most_tokens: dict[int, int] = {}  # by row, of the requests that want speculation
        self._proposals: dict[int, Proposal] = {}  # by row, those under verification
        self._ended = 0.0  # time at which the last step, or the drafting after it, ended
        self._step_seconds: float | None = None  # of the last step; None if it computed prompts, too

    def place(self, row: int, share: ScheduledRequest) -> None:
        """Take note of a request's share of the next step."""
        if share.new:
            self._proposals.pop(row, None)
            self._most_tokens.pop(row, None)
            if share.new.speculates:
                self._most_tokens[row] = share.new.num_prompt_tokens + share.new.params.max_tokens
                self._lengths.join(row)
        self._proposer.place(row, share)

    def execute(
        self,
        backend: Backend,
        batch: ForwardBatch,
        sampling: SamplingBatch,
        scheduled: list[ScheduledRequest],
        layout: StepLayout,
    ) -> SamplerOutput:
        """Compute the step; an accepted drafted token is the token chosen at its place."""
        start = self._clock()
        if start - self._ended < _LONGEST_GAP:
            start = self._ended  # each step pays for what the engine does before it
        if self._by_rejection:
            chosen = self._verify(backend.forward(batch), sampling, scheduled, layout)
        else:
            chosen = backend.execute(batch, sampling)
        self._ended = self._clock()
        has_prompt = len(batch.logits_indices) < len(batch.token_ids)  # tokens that nothing is chosen from cost less
        self._step_seconds = None if has_prompt else self._ended - start
        return chosen

    def _verify(
        self, logits: Float32, sampling: SamplingBatch, scheduled: list[ScheduledRequest], layout: StepLayout
    ) -> SamplerOutput:
        """Choose by rejection sampling."""
        token_ids = sample_reference(logits, sampling).token_ids
        target = probabilities(logits, sampling)
        end = 0
        for share, row, num_logits in zip(scheduled, layout.rows.tolist(), layout.num_logits, strict=True):
            end += num_logits
            if share.spec_token_ids:
                count = len(share.spec_token_ids)
                entries = slice(end - count - 1, end)
                drawn_from = self._proposals[row].probabilities
                proposal = Proposal(share.spec_token_ids, None if drawn_from is None else drawn_from[:count])
                how = sampling.rows[entries.start]
                seed, first = int(how["seed"]), int(how["position"])
                verified = rejection.verify(proposal, target[entries], token_ids[entries].tolist(), seed, first)
                token_ids[entries.start : entries.start + len(verified)] = verified
        return describe(token_ids, logits, sampling)

    def propose(self, scheduled: list[ScheduledRequest], layout: StepLayout, result: StepResult) -> list[list[int]]:
        """Draft what may follow the tokens that a step has chosen; parallel to `scheduled`, or empty if nothing is."""
        verdicts = [
            (row, len(share.spec_token_ids), len(chosen) - 1)
            for share, row, chosen in zip(scheduled, layout.rows.tolist(), result.token_ids, strict=True)
            if share.spec_token_ids
        ]
        self._lengths.stepped(len(scheduled), verdicts, self._step_seconds)
        if self._lengths.rests():
            return []
        candidates, places = self._candidates(scheduled, layout, result)
        proposals: list[list[int]] = [[]] * len(scheduled)
        if candidates:
            began = self._clock()
            self._proposer.catch_up(candidates)
            catching_up = self._clock() - began
            drafted = self._proposer.propose(candidates)
            drafting = self._clock() - self._ended - catching_up
            self._ended += catching_up + drafting
            wanted = [one.num_wanted for one, proposal in zip(candidates, drafted, strict=True) if proposal.token_ids]
            self._lengths.proposed(wanted, drafting, catching_up)
            for place, candidate, proposal in zip(places, candidates, drafted, strict=True):
                self._proposals[candidate.row] = proposal
                proposals[place] = proposal.token_ids
        return proposals

    def _candidates(
        self, scheduled: list[ScheduledRequest], layout: StepLayout, result: StepResult
    ) -> tuple[list[Candidate], list[int]]:
        """Return the requests to draft for, and their places in the step."""
        waiting: list[tuple[int, int, int, int]] = []  # place, row, number of known tokens, most tokens to draft
        for place, (share, row) in enumerate(zip(scheduled, layout.rows.tolist(), strict=True)):
            chosen = result.token_ids[place]
            if not chosen or row not in self._most_tokens or share.is_padding or share.request_id in result.errors:
                continue
            end = share.num_computed_tokens + share.num_scheduled_tokens
            num_tokens = end - len(share.spec_token_ids) + len(chosen)
            room = self._most_tokens[row] - num_tokens - 1
            if self._needs_slots:  # the last drafted token is never read, and needs no slot
                room = min(room, share.num_blocks * self._rows.block_size - num_tokens + 1)
            if room > 0:
                waiting.append((place, row, num_tokens, room))
        if not waiting:
            return [], []
        lengths = self._lengths.lengths([row for _, row, _, _ in waiting])
        wanted = [
            (place, Candidate(row, num_tokens, min(length, room)))
            for (place, row, num_tokens, room), length in zip(waiting, lengths, strict=True)
            if length
        ]
        return [candidate for _, candidate in wanted], [place for place, _ in wanted]
