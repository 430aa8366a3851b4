"""Decides what runs in the next step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from scheduler.admission import check_queue, check_request
from scheduler.config import SchedulerConfig
from scheduler.kv_cache import KVCache
from scheduler.output import (
    FinishReason,
    NewRequest,
    RequestOutput,
    ScheduledRequest,
    SchedulerOutput,
    SchedulerStats,
    StepResult,
    TokenLogprobs,
)
from scheduler.policies import Policy
from scheduler.request import Request, RequestStatus


@dataclass(slots=True)
class _Step:
    """A step in the making.

    Attributes:
        budget: tokens that are left to give out.
        num_behind: running requests still to come, each of which is sure of one token.
        shares: what was given out, by request id.
        is_closed: whether admission is over.
    """

    budget: int
    num_behind: int = 0
    shares: dict[str, ScheduledRequest] = field(default_factory=dict)
    is_closed: bool = False


class Scheduler:
    """Keeps all unfinished requests and gives each step's token budget out to them.

    There are no phases.  A request's `num_computed_tokens` chases its `num_tokens_with_spec`, and a step is a number
    of tokens for each request under one budget; chunked prefill, mixed batches, prefix-cache hits, preemption by
    recompute and speculation all follow from that.  No clock is read here: the time is an argument.
    """

    def __init__(self, config: SchedulerConfig, policy: Policy) -> None:
        self.config = config
        self.policy = policy
        self.kv_cache = KVCache(config.num_blocks, config.block_size, config.enable_prefix_caching)
        self.waiting: OrderedDict[str, Request] = OrderedDict()
        self.running: dict[str, Request] = {}
        self._released: list[str] = []
        self._num_preemptions = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0
        self._num_drafts = 0
        self._num_draft_tokens = 0
        self._num_accepted_tokens_per_pos: list[int] = []

    # -- requests come and go ------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Take a request.

        Raises:
            InvalidRequestError: it can never be served.
            QueueFullError: too many requests are unfinished.
        """
        check_request(self.config, request.num_prompt_tokens, request.params.max_tokens)
        check_queue(self.config, self.num_unfinished)
        assert request.request_id not in self.running, "a request id is used twice"
        assert request.request_id not in self.waiting, "a request id is used twice"
        self.waiting[request.request_id] = request

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request; its blocks are free at once.  None if there is no such request (any more)."""
        request = self.running.get(request_id) or self.waiting.get(request_id)
        return self._finish(request, FinishReason.ABORT) if request else None

    @property
    def num_unfinished(self) -> int:
        return len(self.running) + len(self.waiting)

    # -- a step --------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> SchedulerOutput:
        """Give out the token budget: running requests first, then as many waiting ones as the policy and the blocks
        allow."""
        step = _Step(self.config.max_num_batched_tokens)
        for request in chain(self._still_running(step), self._admissible(step, now)):
            if step.budget == 0:
                break
            self._place(request, step, now)
        released, self._released = self._released, []
        return SchedulerOutput(list(step.shares.values()), released)

    def update(self, output: SchedulerOutput, result: StepResult, now: float) -> list[RequestOutput]:
        """Take in what came of a step; returns the news of each request that has any.

        `output` may be a part of what `schedule` returned.  Requests that ended in the meantime are passed over.
        """
        news: list[RequestOutput] = []
        proposals = result.spec_token_ids or [[]] * len(output.scheduled)
        for share, token_ids, spec_token_ids in zip(output.scheduled, result.token_ids, proposals, strict=True):
            request = self.running.get(share.request_id)
            if request is None:
                continue
            if share.request_id in result.errors:
                news.append(self._finish(request, FinishReason.ERROR, result.errors[share.request_id]))
            elif one := self._settle(request, share, token_ids, result):
                news.append(one)
            # Nothing past the last token that the request may have is worth verifying.
            room = request.max_num_tokens - request.num_tokens - 1
            request.spec_token_ids = spec_token_ids[:room] if room > 0 else []
        return news

    def fail(self, request_id: str, message: str) -> list[RequestOutput]:
        """End a request whose step could not be computed."""
        request = self.running.get(request_id)
        return [self._finish(request, FinishReason.ERROR, message)] if request else []

    # -- what others may see -------------------------------------------------------------------------------------

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_cache_usage=self.kv_cache.usage,
            num_preemptions=self._num_preemptions,
            num_prefix_queries=self._num_prefix_queries,
            num_prefix_hits=self._num_prefix_hits,
            num_drafts=self._num_drafts,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens_per_pos=list(self._num_accepted_tokens_per_pos),
        )

    def check_invariants(self) -> None:
        """Assert that every block is accounted for and every request is where its status says."""
        self.kv_cache.check(self.running.values())
        assert not self.running.keys() & self.waiting.keys()
        for request in self.waiting.values():
            assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
            assert not request.block_ids
            assert request.num_computed_tokens == 0
        for request in self.running.values():
            assert request.status is RequestStatus.RUNNING
            assert request.num_computed_tokens < request.num_tokens_with_spec
            assert request.num_computed_tokens <= len(request.block_ids) * self.config.block_size
        assert len(self.running) <= self.config.max_num_seqs

    # -- the parts of a step -------------------------------------------------------------------------------------

    def _still_running(self, step: _Step) -> Iterator[Request]:
        """Running requests in the order of admission, but those that fall victim to an earlier one meanwhile."""
        requests = tuple(self.running.values())
        step.num_behind = len(requests)
        for request in requests:
            step.num_behind -= 1
            if request.status is RequestStatus.RUNNING:
                yield request

    def _admissible(self, step: _Step, now: float) -> Iterator[Request]:
        """Waiting requests in the policy's order; read lazily, so that each answer sees the admissions before it."""
        if not self.waiting or len(self.running) >= self.config.max_num_seqs:
            return
        for request in self.policy.order(tuple(self.waiting.values()), now):
            if step.is_closed or len(self.running) >= self.config.max_num_seqs:
                return
            if self.policy.admits(request, self.running.values(), now):
                yield request

    def _place(self, request: Request, step: _Step, now: float) -> None:
        """Give the request its share of the step, if there is room for it."""
        while (block_ids := self.kv_cache.reserve(request)) is None:
            if request.spec_token_ids:
                request.spec_token_ids = []  # a guess is not worth a preemption
            elif (victim := self.policy.victim(request, self.running.values(), now)) is not None:
                self._preempt(victim, step)
            else:
                step.is_closed = True  # nobody overtakes whoever waits for blocks
                if request.status is RequestStatus.RUNNING:
                    self._preempt(request, step)
                return

        if self.config.num_lookahead_tokens and request.speculates:
            block_ids += self.kv_cache.reserve_ahead(request, self.config.num_lookahead_tokens)
        new = None
        if request.status is not RequestStatus.RUNNING:
            new = NewRequest(list(request.token_ids), request.num_prompt_tokens, request.params, request.speculates)
            self._join(request, now)
        start, num_tokens = request.num_computed_tokens, request.num_tokens
        wanted = num_tokens + len(request.spec_token_ids) - start
        count = min(wanted, self.config.max_chunk_tokens, step.budget - step.num_behind)
        end = start + count
        samples = end >= num_tokens and request.params.max_tokens > 0
        spec_token_ids = request.spec_token_ids[: end - num_tokens] if end > num_tokens else []
        step.budget -= count
        step.shares[request.request_id] = ScheduledRequest(
            request.request_id, start, count, block_ids, len(request.block_ids), samples, spec_token_ids, new
        )

    def _join(self, request: Request, now: float) -> None:
        """Move a request from waiting to running."""
        del self.waiting[request.request_id]
        self.running[request.request_id] = request
        request.status = RequestStatus.RUNNING
        self._num_prefix_queries += request.num_tokens
        self._num_prefix_hits += request.num_computed_tokens
        if request.scheduled_time is None:
            request.scheduled_time = now
            request.num_cached_tokens = request.num_computed_tokens

    def _preempt(self, victim: Request, step: _Step) -> None:
        """Take a running request's blocks and its share; it will be computed again."""
        share = step.shares.pop(victim.request_id, None)
        if share is not None:
            step.budget += share.num_scheduled_tokens
        step.is_closed = True  # whoever is admitted now would only take back the blocks that were lost
        self._num_preemptions += 1
        victim.num_preemptions += 1
        victim.spec_token_ids = []
        self._leave(victim, RequestStatus.PREEMPTED)
        self.waiting[victim.request_id] = victim
        self.waiting.move_to_end(victim.request_id, last=False)

    def _settle(
        self, request: Request, share: ScheduledRequest, token_ids: list[int], result: StepResult
    ) -> RequestOutput | None:
        """Move the request forward by what its share computed; its news, if there are any."""
        num_rejected = len(share.spec_token_ids) + 1 - len(token_ids) if token_ids else 0
        if share.spec_token_ids:
            self._count_draft(request, len(share.spec_token_ids), num_rejected)
        before = share.num_computed_tokens
        is_first = request.num_output_tokens == 0
        finish_reason, token_ids = self._append(request, token_ids)
        computed = before + share.num_scheduled_tokens - num_rejected
        request.num_computed_tokens = min(computed, request.num_tokens)  # less, if it ended inside accepted tokens
        if request.params.max_tokens == 0 and computed == request.num_tokens:
            finish_reason = FinishReason.LENGTH
        self.kv_cache.publish(request, before)

        scored = result.prompt_logprobs.get(share.request_id)
        prompt_logprobs = self._unreported(request, share, scored) if scored else None
        if not (token_ids or finish_reason or prompt_logprobs):
            return None
        news = RequestOutput(share.request_id, token_ids, finish_reason, prompt_logprobs=prompt_logprobs)
        if share.request_id in result.logprobs:
            news.logprobs = result.logprobs[share.request_id][: len(token_ids)]
        news.num_accepted_tokens, news.num_rejected_tokens = request.num_accepted_tokens, request.num_rejected_tokens
        if is_first and request.scheduled_time is not None:
            news.num_cached_tokens = request.num_cached_tokens
            news.queue_time = request.scheduled_time - request.arrival_time
        if finish_reason:
            self._leave(request, RequestStatus.FINISHED)
        return news

    def _count_draft(self, request: Request, num_drafted: int, num_rejected: int) -> None:
        num_accepted = num_drafted - num_rejected
        request.num_accepted_tokens += num_accepted
        request.num_rejected_tokens += num_rejected
        self._num_drafts += 1
        self._num_draft_tokens += num_drafted
        per_pos = self._num_accepted_tokens_per_pos
        per_pos += [0] * (num_drafted - len(per_pos))
        for index in range(num_accepted):
            per_pos[index] += 1

    def _append(self, request: Request, token_ids: list[int]) -> tuple[FinishReason | None, list[int]]:
        """Append chosen tokens up to the one that ends the request; why it ends, if it does, and what was appended."""
        stop_token_ids = request.params.stop_token_ids
        for index, token_id in enumerate(token_ids):
            request.token_ids.append(token_id)
            if token_id in stop_token_ids:
                return FinishReason.STOP, token_ids[: index + 1]
            if len(request.token_ids) == request.max_num_tokens:
                return FinishReason.LENGTH, token_ids[: index + 1]
        return None, token_ids

    def _unreported(
        self, request: Request, share: ScheduledRequest, scored: list[TokenLogprobs]
    ) -> list[TokenLogprobs]:
        """Of the prompt's log-probabilities that the share computed, those not reported before a preemption."""
        start = share.num_computed_tokens + 1  # a token's logits score the token after it
        new = scored[max(request.num_scored_tokens - start, 0) :]
        request.num_scored_tokens = max(request.num_scored_tokens, start + len(scored))
        return new

    # -- the end of a request ------------------------------------------------------------------------------------

    def _finish(self, request: Request, reason: FinishReason, error: str | None = None) -> RequestOutput:
        self._leave(request, RequestStatus.FINISHED)
        return RequestOutput(request.request_id, [], reason, error=error)

    def _leave(self, request: Request, status: RequestStatus) -> None:
        """Take a request out of wherever it is, and give its blocks back."""
        if self.running.pop(request.request_id, None) is not None:
            self._released.append(request.request_id)
            self.kv_cache.release(request)
        self.waiting.pop(request.request_id, None)
        request.status = status
