"""What the executor knows of speculation: propose after a step, verify in the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from shoal.model.speculation import rejection
from shoal.model.speculation.length import LengthRule
from shoal.model.speculation.proposer import NO_PROPOSAL, Candidate, Proposal, Proposer
from shoal.model.step.batch import Backend, Float32, ForwardBatch, SamplerOutput, SamplingBatch
from shoal.model.step.layout import StepLayout
from shoal.model.step.reference import describe
from shoal.model.step.rows import BatchRows
from shoal.model.step.sampling import probabilities, sample_reference
from shoal.scheduler.output import ScheduledRequest, StepResult

NOTHING: Mapping[int, list[int]] = {}
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
        self._needs_slots, self.by_rejection, self._clock = needs_slots, by_rejection, clock
        self._most_tokens: dict[int, int] = {}  # by row, of the requests that want speculation
        self._proposals: dict[int, Proposal] = {}  # by row, those under verification
        self._known: Mapping[int, list[int]] = {}  # by row, those of them that nobody drafted
        self._ended = 0.0  # time at which the last step, or the drafting after it, ended
        self._step_seconds: float | None = None  # of the last step; None if it computed prompts, too

    def place(self, share: ScheduledRequest) -> None:
        """Take note of a request's share of the next step."""
        row = share.row
        if share.new:
            self._proposals.pop(row, None)
            self._most_tokens.pop(row, None)
            if share.new.speculates:
                self._most_tokens[row] = share.new.num_prompt_tokens + share.new.params.max_tokens
                self._lengths.join(row)
        self._proposer.place(share)

    def leave(self, row: int) -> None:
        """Take note that the request in the row, if there is one, leaves the batch."""
        self._proposer.leave(row)

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
        self._proposer.prepare(batch)
        if self.by_rejection:
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
        for share, num_logits in zip(scheduled, layout.num_logits, strict=True):
            end += num_logits
            if share.spec_token_ids:
                entries = slice(end - len(share.spec_token_ids) - 1, end)
                proposal = replace(self._proposals[share.row], token_ids=share.spec_token_ids)
                how = sampling.rows[entries.start]
                seed, first = int(how["seed"]), int(how["position"])
                verified = rejection.verify(proposal, target[entries], token_ids[entries].tolist(), seed, first)
                token_ids[entries.start : entries.start + len(verified)] = verified
        return describe(token_ids, logits, sampling.rows)

    def propose(
        self, scheduled: list[ScheduledRequest], result: StepResult, known: Mapping[int, list[int]] = NOTHING
    ) -> list[list[int]]:
        """Draft what may follow the tokens that a step has chosen; parallel to `scheduled`, or empty if nothing is.

        Args:
            known: by row, tokens that are known to follow; nothing is drafted there.
        """
        verdicts = [
            (share.row, len(share.spec_token_ids), len(chosen) - 1)
            for share, chosen in zip(scheduled, result.token_ids, strict=True)
            if share.spec_token_ids and share.row not in self._known
        ]
        self._proposer.stepped(scheduled, result)
        self._known = known
        self._proposals |= {row: Proposal(token_ids) for row, token_ids in known.items()}
        self._lengths.stepped(len(scheduled), verdicts, self._step_seconds)
        candidates = [] if self._lengths.rests() else self._candidates(scheduled, result)
        if not candidates:
            return [known.get(share.row, []) for share in scheduled] if known else []
        began = self._clock()
        self._proposer.catch_up(candidates)
        catching_up = self._clock() - began
        proposals = self._proposer.propose(candidates)
        drafting = self._clock() - self._ended - catching_up
        self._ended += catching_up + drafting
        wanted = [one.num_wanted for one in candidates if proposals[one.row].token_ids]
        self._lengths.proposed(wanted, drafting, catching_up)
        self._proposals |= proposals
        return [known.get(share.row) or proposals.get(share.row, NO_PROPOSAL).token_ids for share in scheduled]

    def _candidates(self, scheduled: list[ScheduledRequest], result: StepResult) -> list[Candidate]:
        """Return the requests to draft for."""
        able: list[Candidate] = []  # each with the most tokens that it has room for
        for share, chosen in zip(scheduled, result.token_ids, strict=True):
            row = share.row
            if (
                row in self._known
                or not chosen
                or row not in self._most_tokens
                or share.is_padding
                or share.request_id in result.errors
            ):
                continue
            end = share.num_computed_tokens + share.num_scheduled_tokens
            num_tokens = end - len(share.spec_token_ids) + len(chosen)
            room = self._most_tokens[row] - num_tokens - 1
            if self._needs_slots:  # the last drafted token is never read, and needs no slot
                num_slots = share.num_blocks // self._rows.num_groups * self._rows.block_size
                room = min(room, num_slots - num_tokens + 1)
            if room > 0:
                able.append(Candidate(row, num_tokens, room))
        lengths = self._lengths.lengths([one.row for one in able]) if able else []
        return [
            Candidate(one.row, one.num_tokens, min(length, one.num_wanted))
            for one, length in zip(able, lengths, strict=True)
            if length
        ]
