"""Decides what runs in the next step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from shoal.scheduler.admission import check_queue, check_request
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.kv_cache import KVCache
from shoal.scheduler.output import (
    FinishReason,
    NewRequest,
    RequestOutput,
    ScheduledRequest,
    SchedulerOutput,
    SchedulerStats,
    StepResult,
    TokenLogprobs,
)
from shoal.scheduler.pacing import Pacing
from shoal.scheduler.policies import Policy
from shoal.scheduler.request import Request, RequestStatus
from shoal.scheduler.waiting import WaitingQueue


@dataclass(slots=True)
class _Step:
    """A step in the making.

    Attributes:
        budget: tokens that are left to give out.
        behind: running requests whose turn is still to come; each of them is sure of one token unless it pauses.
        shares: the shares that were given out, by request id.
        victims: the requests that were preempted, and the ids of those for which they were.  They begin to wait when
            the step is scheduled, so that the queue does not grow while it is read.
        is_closed: whether admission is over.
    """

    budget: int
    behind: set[Request]
    shares: dict[str, ScheduledRequest] = field(default_factory=dict)
    victims: dict[Request, str] = field(default_factory=dict)
    is_closed: bool = False


class Scheduler:
    """Keeps all unfinished requests and gives each step's token budget out to them.

    There are no phases.  A request's `num_computed_tokens` chases its `num_tokens_with_spec`, and a step is a number
    of tokens for each request under one budget.  Chunked prefill, mixed batches, prefix-cache hits, preemption by
    recompute and speculation all follow from that.  No clock is read here: the time is an argument.

    Attributes:
        waiting, running: all unfinished requests, by id; the waiting ones in the order of the policy's keys.
        free_rows: of the batch, a heap.
        padding: requests that have ended and been answered, but whose rows the policy keeps in the batch.  Each gets a
            share of one token, which recomputes its last position in place.  They give way first.
    """

    def __init__(self, config: SchedulerConfig, policy: Policy) -> None:
        self.config = config
        self.policy = policy
        self.kv_cache = KVCache(config)
        self.waiting = WaitingQueue(policy.key)
        self.running: dict[str, Request] = {}
        self.padding: dict[str, Request] = {}
        self.free_rows = list(range(config.max_num_seqs))
        self._released: list[int] = []
        self._pacing = Pacing(config.target_step_ms / 1000, config.max_num_batched_tokens)
        self._scheduled_at = 0.0
        self._counts = SchedulerStats(0, 0, 0.0, 0, 0, 0)  # but for what `stats` adds

    # -- requests come and go ------------------------------------------------------------------------------------

    def add(self, request: Request, *, is_bounded: bool = True) -> None:
        """Take a request, however many there are if it is not bounded.

        Raises:
            InvalidRequestError: it can never be served.
            QueueFullError: too many requests are unfinished.
        """
        check_request(self.config, request.num_prompt_tokens, request.params.max_tokens)
        if is_bounded:
            check_queue(self.config, self.num_unfinished)
        for requests in (self.running, self.waiting, self.padding):
            assert request.request_id not in requests, "a request id is used twice"
        self.policy.on_arrival(request)
        self.waiting.add(request)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request; its row and its blocks are free at once.  Returns None if no such request is unfinished."""
        request = self.running.get(request_id) or self.waiting.get(request_id)
        return self._finish(request, FinishReason.ABORT) if request else None

    def use(self, policy: Policy) -> None:
        """Schedule by another policy from now on; no request may be unfinished."""
        assert not self.num_unfinished
        self.policy, self.waiting = policy, WaitingQueue(policy.key)

    @property
    def num_unfinished(self) -> int:
        return len(self.running) + len(self.waiting)

    def wake_time(self, now: float) -> float | None:
        """The time at which there is something to schedule; None if there is nothing until a request comes."""
        if self.running:
            return now
        return max(now, self.policy.wake_time(self.waiting.values(), now)) if self.waiting else None

    # -- a step --------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> SchedulerOutput:
        """Give out the token budget, in the policy's order.

        All running requests that do not pause get a share of at least one token.  As many waiting requests join as
        policy, rows and blocks allow.
        """
        self._scheduled_at = now
        budget = self._budget()
        step = _Step(budget, set(self.running.values()))
        self._pad(step)
        for request in self._candidates(step, now):
            self._place(request, step, now)
        self._counts.num_deferred = 0 if step.is_closed else len(self.waiting)
        while self.running and self.running.keys().isdisjoint(step.shares):  # all would pause
            self._place(next(iter(self.running.values())), step, now)
        for victim in step.victims:
            self.waiting.add(victim)
            self.policy.on_preemption(victim)
        released, self._released = self._released, []
        self._counts.num_steps += bool(step.shares)
        self._counts.num_step_tokens += budget - step.budget
        preempted = {victim.request_id: by for victim, by in step.victims.items()}
        return SchedulerOutput(list(step.shares.values()), released, preempted)

    def update(self, output: SchedulerOutput, result: StepResult, now: float) -> list[RequestOutput]:
        """Take in the result of a step; returns the news of each request that has any.

        `output` may be a part of what `schedule` returned.  Requests that have ended in the meantime are skipped.
        """
        self._learn(output, now)
        news: list[RequestOutput] = []
        proposals = result.spec_token_ids or [[]] * len(output.scheduled)
        for share, token_ids, spec_token_ids in zip(output.scheduled, result.token_ids, proposals, strict=True):
            request = self.running.get(share.request_id)
            if request is None:
                continue
            if share.request_id in result.errors:
                news.append(self._finish(request, *result.errors[share.request_id]))
            elif one := self._settle(request, share, token_ids, result):
                news.append(one)
            request.spec_token_ids = spec_token_ids
            if spec_token_ids:  # nothing past the last token that the request may have is worth verifying
                request.spec_token_ids = spec_token_ids[: max(request.max_num_tokens - request.num_tokens - 1, 0)]
        return news

    def fail(self, request_id: str, message: str) -> list[RequestOutput]:
        """End a request whose share could not be computed.  Returns its news; a padding row has none."""
        if request := self.running.get(request_id):
            return [self._finish(request, FinishReason.ERROR, message)]
        if request := self.padding.get(request_id):
            self._leave(request, RequestStatus.FINISHED)
        return []

    # -- what others may see -------------------------------------------------------------------------------------

    def stats(self) -> SchedulerStats:
        return replace(
            self._counts,
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_cache_usage=self.kv_cache.pool.num_owned / self.config.num_blocks,
            num_accepted_tokens_per_pos=list(self._counts.num_accepted_tokens_per_pos),
        )

    # -- the parts of a step -------------------------------------------------------------------------------------

    def _budget(self) -> int:
        """Tokens of a step: those of requests that decode, with what is drafted, and of prompts what pacing allows."""
        most, running = self.config.max_num_batched_tokens, self.running.values()
        if all(request.num_tokens - request.num_computed_tokens > 1 for request in running):
            return most  # nobody waits for the end of the step
        num_tokens = len(self.padding) + len(running) + sum([len(request.spec_token_ids) for request in running])
        return min(most, num_tokens + self._pacing.num_prompt_tokens)

    def _learn(self, output: SchedulerOutput, now: float) -> None:
        """Tell the pacing what a step cost; a share of more tokens than one, and drafted ones, is a prompt's."""
        counts = [share.num_scheduled_tokens - len(share.spec_token_ids) for share in output.scheduled]
        num_decoding = counts.count(1)
        self._pacing.learn(num_decoding, sum(counts) - num_decoding, now - self._scheduled_at)

    def _pad(self, step: _Step) -> None:
        """Give each padding row the token that it recomputes."""
        for request in self.padding.values():
            step.budget -= 1
            start, samples = request.num_computed_tokens - 1, request.params.max_tokens > 0
            request_id, num_blocks = request.request_id, len(request.block_ids)
            step.shares[request_id] = ScheduledRequest(
                request_id, request.row, start, 1, [], num_blocks, samples, [], None, is_padding=True
            )

    def _candidates(self, step: _Step, now: float) -> Iterator[Request]:
        """The requests that may have a share, in the policy's order.

        These are those of the order that were not preempted for an earlier one and have a row, or find one.  The order
        is read lazily, so that it depends on the admissions so far.
        """
        for request in self.policy.order(tuple(self.running.values()), self.waiting.values(), now):
            if request in step.behind:
                step.behind.remove(request)
                yield request
            elif request not in step.victims and self._is_admissible(request, step, now):
                yield request
            if step.is_closed and not step.behind:
                return

    def _is_admissible(self, request: Request, step: _Step, now: float) -> bool:
        """Whether a waiting request may join the batch; if the batch is full, another request leaves it first."""
        if step.is_closed:
            return False
        if self.free_rows:
            step.is_closed = step.budget == len(step.behind)
        else:
            step.is_closed = not self._make_room(request, step, now)
        return not step.is_closed

    def _place(self, request: Request, step: _Step, now: float) -> None:
        """Give the request its share of the step, if there is room for it."""
        while (block_ids := self.kv_cache.reserve(request)) is None:
            if request.spec_token_ids:
                request.spec_token_ids = []  # a guess is not worth a preemption
                continue
            # A request that was admitted now would overtake this one, or take blocks for which others are preempted.
            step.is_closed = True
            if not self._make_room(request, step, now):
                if request.status is RequestStatus.RUNNING:
                    self._preempt(request, step, request)
                return

        if self.config.num_lookahead_tokens and request.speculates:
            block_ids += self.kv_cache.reserve_ahead(request, self.config.num_lookahead_tokens)
        new = None
        if request.row < 0:
            how = request.params, request.speculates, request.scheduling.cache_salt
            new = NewRequest(request.token_ids.tolist(), request.num_prompt_tokens, *how)
            self._join(request, now)
        start, num_tokens = request.num_computed_tokens, request.num_tokens
        wanted = num_tokens + len(request.spec_token_ids) - start
        count = min(wanted, self.config.max_chunk_tokens, step.budget - len(step.behind))
        num_drafted = start + count - num_tokens  # below 0 if known tokens are left
        samples = num_drafted >= 0 and request.params.max_tokens > 0
        spec_token_ids = request.spec_token_ids[:num_drafted] if num_drafted > 0 else []
        step.budget -= count
        request_id, num_blocks = request.request_id, len(request.block_ids)
        step.shares[request_id] = ScheduledRequest(
            request_id, request.row, start, count, block_ids, num_blocks, samples, spec_token_ids, new
        )

    def _join(self, request: Request, now: float) -> None:
        """Move a request from waiting to running, into the lowest free row."""
        self.waiting.discard(request.request_id)
        self.running[request.request_id] = request
        request.row = heappop(self.free_rows)
        request.status = RequestStatus.RUNNING
        self._counts.num_prefix_queries += request.num_tokens
        self._counts.num_prefix_hits += request.num_computed_tokens
        if request.scheduled_time is None:
            request.scheduled_time = now
            request.num_cached_tokens = request.num_computed_tokens
        self.policy.on_admission(request)

    def _make_room(self, request: Request, step: _Step, now: float) -> bool:
        """Free the row and the blocks of a request that gives way to this one; returns False if none does."""
        if self.padding:
            row = next(reversed(self.padding.values()))
            self._withdraw(row, step)
            self._leave(row, RequestStatus.FINISHED)
        elif (victim := self.policy.victim(request, self.running.values(), now)) is not None:
            self._preempt(victim, step, request)
        else:
            return False
        return True

    def _withdraw(self, request: Request, step: _Step) -> None:
        """Take a share back, if one was given."""
        share = step.shares.pop(request.request_id, None)
        if share is not None:
            step.budget += share.num_scheduled_tokens

    def _preempt(self, victim: Request, step: _Step, request: Request) -> None:
        """Take a running request's row, blocks and share; it will be computed again."""
        self._withdraw(victim, step)
        step.behind.discard(victim)
        step.victims[victim] = request.request_id
        self._counts.num_preemptions += 1
        victim.num_preemptions += 1
        victim.spec_token_ids = []
        self._leave(victim, RequestStatus.PREEMPTED)

    def _settle(
        self, request: Request, share: ScheduledRequest, token_ids: list[int], result: StepResult
    ) -> RequestOutput | None:
        """Move the request forward by what its share computed; returns its news, if there are any."""
        num_rejected = len(share.spec_token_ids) + 1 - len(token_ids) if token_ids else 0
        if share.spec_token_ids:
            self._counts.add_draft(len(share.spec_token_ids), num_rejected)
        before = share.num_computed_tokens
        is_first = request.num_output_tokens == 0
        finish_reason, token_ids = self._append(request, token_ids)
        if token_ids:
            self.policy.on_progress(request, len(token_ids))
        request.num_computed_tokens = before + share.num_scheduled_tokens - num_rejected
        if finish_reason:  # maybe inside accepted tokens
            request.num_computed_tokens = min(request.num_computed_tokens, request.num_tokens)
        elif request.params.max_tokens == 0 and request.num_computed_tokens == request.num_tokens:
            finish_reason = FinishReason.LENGTH
        self.kv_cache.advance(request, before)

        scored = result.prompt_logprobs.get(share.request_id)
        prompt_logprobs = self._unreported(request, share, scored) if scored else None
        if not (token_ids or finish_reason or prompt_logprobs):
            return None
        news = RequestOutput(share.request_id, token_ids, finish_reason, None, prompt_logprobs)
        if request.num_preemptions:
            news.num_preemptions = request.num_preemptions
        news.embedding = result.embeddings.get(share.request_id)
        if share.request_id in result.logprobs:
            news.logprobs = result.logprobs[share.request_id][: len(token_ids)]
        if share.spec_token_ids:
            news.num_accepted_tokens = len(share.spec_token_ids) - num_rejected
            news.num_rejected_tokens = num_rejected
        if is_first and request.scheduled_time is not None:
            news.num_cached_tokens = request.num_cached_tokens
            news.queue_time = request.scheduled_time - request.arrival_time
        if finish_reason:
            self._end(request, finish_reason)
        return news

    def _append(self, request: Request, token_ids: list[int]) -> tuple[FinishReason | None, list[int]]:
        """Append chosen tokens up to one that ends the request; returns the reason, if it ends, and those appended."""
        known, stop_token_ids = request.token_ids, request.params.stop_token_ids
        for index, token_id in enumerate(token_ids):
            known.append(token_id)
            if token_id in stop_token_ids:
                return FinishReason.STOP, token_ids[: index + 1]
            if len(known) == request.max_num_tokens:
                return FinishReason.LENGTH, token_ids[: index + 1]
        return None, token_ids

    def _unreported(
        self, request: Request, share: ScheduledRequest, scored: list[TokenLogprobs]
    ) -> list[TokenLogprobs]:
        """The prompt's log-probabilities that the share computed and that were not reported before a preemption."""
        start = share.num_computed_tokens + 1  # a token's logits score the token after it
        new = scored[max(request.num_scored_tokens - start, 0) :]
        request.num_scored_tokens = max(request.num_scored_tokens, start + len(scored))
        return new

    # -- the end of a request ------------------------------------------------------------------------------------

    def _finish(self, request: Request, reason: FinishReason, error: str | None = None) -> RequestOutput:
        self._end(request, reason)
        return RequestOutput(request.request_id, [], reason, error=error)

    def _end(self, request: Request, reason: FinishReason) -> None:
        """Free the request's row and blocks, unless the policy pads it.  Padding rows whose batch ends leave too."""
        self.policy.on_finish(request, reason)
        if reason in (FinishReason.STOP, FinishReason.LENGTH) and self.policy.pads(request):
            request.status = RequestStatus.FINISHED
            self.padding[request.request_id] = self.running.pop(request.request_id)
        else:
            self._leave(request, RequestStatus.FINISHED)
        for row in [row for row in self.padding.values() if not self.policy.pads(row)]:
            self._leave(row, RequestStatus.FINISHED)

    def _leave(self, request: Request, status: RequestStatus) -> None:
        """Take a request out of the batch or the queue, and its row and its blocks back."""
        if self.running.pop(request.request_id, None) or self.padding.pop(request.request_id, None):
            self._released.append(request.row)
            heappush(self.free_rows, request.row)
            request.row = -1
            self.kv_cache.release(request)
        self.waiting.discard(request.request_id)
        request.status = status
