"""Scripted executors that record what they are asked for and fail on command.

They keep token ids where a model keeps keys and values, and choose the next token from what they read back
through the block tables, as far as queries see it.  So a wrong slot, block table, position, preemption or prefix-cache
hit shows as a wrong token, and most of them as a failed assertion before.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from shoal.scheduler.config import CacheGroup, Config, SchedulerConfig
from shoal.scheduler.engine import EngineCore, Executor
from shoal.scheduler.invariants import check_invariants
from shoal.scheduler.output import (
    FinishReason,
    NewRequest,
    RequestOutput,
    SamplingParams,
    ScheduledRequest,
    SchedulerOutput,
    SchedulingParams,
    StepResult,
    TokenLogprobs,
)
from shoal.scheduler.policies import Policy, find_policy
from shoal.scheduler.request import Request, RequestStatus
from shoal.scheduler.scheduler import Scheduler

Choose = Callable[[str, list[int]], int]  # request id, context -> the token after it
Draft = Callable[[str, list[int]], list[int]]  # request id, context -> drafted tokens after it
AnyPolicy = TypeVar("AnyPolicy", bound=Policy)
LIMITS = SchedulerConfig(num_blocks=1, max_model_len=16)  # for policies that read none of them
ALL = (CacheGroup(),)  # one cache group that sees all


def params(max_tokens: int = 4, **others: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **({"seed": 0} | others))  # type: ignore[arg-type]  # any field


def make_policy(kind: type[AnyPolicy], **knobs: object) -> AnyPolicy:
    return kind(LIMITS, kind.Knobs(**knobs))


def named_policy(name: str, limits: SchedulerConfig, values: Mapping[str, Any]) -> Policy:
    """The policy of this name, with those of these values that are its knobs."""
    kind = find_policy(name)
    return kind(limits, kind.Knobs.select(values))


def digest(context: list[int], seed: int = 0) -> int:
    """32 bits that depend on every token of the context and on its order."""
    return zlib.crc32(array("q", context).tobytes(), seed & 0xFFFFFFFF)


def seen(context: list[int], groups: Sequence[CacheGroup]) -> list[int]:
    """What the last token of the context sees in each group, one after the other."""
    return [token for group in groups for token in context[group.first_seen(len(context) - 1) :]]


def hashed(vocab_size: int) -> Choose:
    """A deterministic language model: the next token is a hash of the whole context."""
    return lambda _, context: digest(context) % vocab_size


def scripted(texts: Mapping[str, list[int]]) -> Choose:
    """Plays whole texts, by request id; the prompt is part of the text."""
    return lambda request_id, context: texts[request_id][len(context)]


def generate(choose: Choose, request_id: str, prompt: list[int], params: SamplingParams) -> list[int]:
    """Generate the tokens that a request gets alone, in a plain loop: the oracle of every schedule."""
    context = list(prompt)
    while len(context) < len(prompt) + params.max_tokens:
        context.append(choose(request_id, context))
        if context[-1] in params.stop_token_ids:
            break
    return context[len(prompt) :]


class Share(NamedTuple):
    """What an executor was asked for: `num_tokens` tokens from position `start` on, over these blocks."""

    request_id: str
    start: int
    num_tokens: int
    blocks: tuple[int, ...]


class InjectedError(Exception):
    """A failure that a test asked for."""


@dataclass
class _Sequence:
    """The state that an executor keeps of a request in the batch."""

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    num_computed_tokens: int
    block_table: list[int] = field(default_factory=list)

    @classmethod
    def joining(cls, share: ScheduledRequest, new: NewRequest) -> _Sequence:
        tokens = list(new.token_ids)
        return cls(share.request_id, tokens, new.num_prompt_tokens, new.params, share.num_computed_tokens)


class FakeExecutor:
    """Plays a `choose` function over a paged fake KV cache.

    Attributes:
        steps: the shares of each call, in order; calls that fail are there too.
        released: the released rows of each call.
        sequences: what is known of the requests in the batch, by row.
        fail: called with each schedule before it is computed; raises to make the step fail.
        error: called with each share; a message makes that request fail alone.
    """

    def __init__(
        self, block_size: int, choose: Choose, draft: Draft | None = None, groups: Sequence[CacheGroup] = ALL
    ) -> None:
        self.block_size = block_size
        self.groups = groups
        self.choose = choose
        self.draft = draft
        self.steps: list[list[Share]] = []
        self.released: list[list[int]] = []
        self.fail: Callable[[SchedulerOutput], None] = lambda _: None
        self.error: Callable[[ScheduledRequest], str | None] = lambda _: None
        self.sequences: dict[int, _Sequence] = {}
        self.kv: dict[int, tuple[int, int, int]] = {}  # slot -> cache group, position, token id

    def execute(self, output: SchedulerOutput) -> StepResult:
        for row in output.released:
            self.sequences.pop(row, None)
        self.released.append(list(output.released))
        self.steps.append([self._place(share) for share in output.scheduled])
        self.fail(output)
        self._write_all(output.scheduled)
        result = StepResult([])
        for share in output.scheduled:
            self._read(share, result)
        return result

    def _place(self, share: ScheduledRequest) -> Share:
        """Take in what is new of a request, and check that the share agrees with what is known of it."""
        if share.new:
            known = self.sequences.get(share.row)
            assert known is None or known.request_id == share.request_id, "the row has another request"
            self.sequences[share.row] = _Sequence.joining(share, share.new)
        sequence = self.sequences[share.row]
        assert sequence.request_id == share.request_id, "the row is another request's"
        kept = share.num_blocks - len(share.new_block_ids)
        sequence.block_table[kept:] = share.new_block_ids
        assert len(sequence.block_table) == share.num_blocks
        assert share.new is None or kept == 0, "a request that joins is given its whole block table"

        num_tokens, end = len(sequence.token_ids), share.num_computed_tokens + share.num_scheduled_tokens
        table = tuple(sequence.block_table)
        if share.is_padding:
            assert share.num_scheduled_tokens == 1
            assert end <= sequence.num_computed_tokens, "padding computes nothing new"
            assert not (share.new_block_ids or share.spec_token_ids or share.new)
            return Share(share.request_id, share.num_computed_tokens, 1, table)
        assert share.num_computed_tokens == sequence.num_computed_tokens
        assert share.num_scheduled_tokens > 0
        assert end == num_tokens + len(share.spec_token_ids) if share.spec_token_ids else end <= num_tokens
        assert share.num_blocks % len(self.groups) == 0
        assert end <= share.num_blocks // len(self.groups) * self.block_size
        assert share.samples == (end >= num_tokens and sequence.params.max_tokens > 0)
        return Share(share.request_id, share.num_computed_tokens, share.num_scheduled_tokens, table)

    def _write_all(self, scheduled: list[ScheduledRequest]) -> None:
        written: set[int] = set()
        for share in scheduled:
            sequence = self.sequences[share.row]
            tokens = sequence.token_ids + share.spec_token_ids
            for position in range(share.num_computed_tokens, share.num_computed_tokens + share.num_scheduled_tokens):
                for group in range(len(self.groups)):
                    slot = self._slot(sequence, position, group)
                    assert slot not in written, "two tokens of a step want the same slot"
                    written.add(slot)
                    self.kv[slot] = group, position, tokens[position]

    def _read(self, share: ScheduledRequest, result: StepResult) -> None:
        """Read the context back, choose after it, verify drafted tokens, propose the next ones."""
        sequence = self.sequences[share.row]
        end = share.num_computed_tokens + share.num_scheduled_tokens
        context = (sequence.token_ids + share.spec_token_ids)[:end]
        for number, group in enumerate(self.groups):
            for position in range(group.first_seen(share.num_computed_tokens), end):
                held = self.kv[self._slot(sequence, position, number)]
                assert held == (number, position, context[position]), "the KV cache holds another token"
        chosen: list[int] = []
        if share.samples:
            known = end - len(share.spec_token_ids)
            for drafted in [*share.spec_token_ids, None]:
                chosen.append(self.choose(share.request_id, context[: known + len(chosen)]))
                if chosen[-1] != drafted:
                    break
        if message := self.error(share):
            result.errors[share.request_id] = FinishReason.ERROR, message
        if share.is_padding:
            assert chosen == sequence.token_ids[end : end + len(chosen)], "padding chose another token than before"
            result.token_ids.append(chosen)
            if self.draft:
                result.spec_token_ids.append([])
            return
        self._score(share, sequence, chosen, result)
        sequence.token_ids += chosen
        sequence.num_computed_tokens = len(sequence.token_ids) - 1 if chosen else end
        result.token_ids.append(chosen)
        if self.draft:
            result.spec_token_ids.append(self.draft(share.request_id, sequence.token_ids) if chosen else [])

    def _score(self, share: ScheduledRequest, sequence: _Sequence, chosen: list[int], result: StepResult) -> None:
        """Log-probabilities that tell where they belong: rank is the position, logprob is minus the token id."""
        first, end = share.num_computed_tokens + 1, share.num_computed_tokens + share.num_scheduled_tokens + 1
        if sequence.params.num_logprobs is not None and chosen:
            start = len(sequence.token_ids)
            result.logprobs[share.request_id] = [
                TokenLogprobs(-token_id, start + index, [], []) for index, token_id in enumerate(chosen)
            ]
        scored = range(first, min(end, sequence.num_prompt_tokens))
        if sequence.params.num_prompt_logprobs is not None and scored:
            result.prompt_logprobs[share.request_id] = [
                TokenLogprobs(-sequence.token_ids[position], position, [], []) for position in scored
            ]

    def _slot(self, sequence: _Sequence, position: int, group: int) -> int:
        block_id = sequence.block_table[position // self.block_size * len(self.groups) + group]
        assert block_id >= 0, "a block that a query sees went back"
        return block_id * self.block_size + position % self.block_size


class Harness:
    """An engine on a fake executor.  Every step is checked: invariants, limits, and that no request gets news after
    its end.

    Args:
        policy: one that is made already, or the name or the type of one.
        knobs: of one that is not made yet.

    Attributes:
        now: the time that the engine sees; each step takes one second.
        token_ids, prompt_logprobs, logprobs: what was delivered so far, by request id.
        finish_reasons, errors: of the requests that ended, by request id.
        num_pauses: how often a running request paused for a step.
        first_news: the first output of each request that brings news, by request id.
    """

    def __init__(
        self,
        choose: Choose | None = None,
        draft: Draft | None = None,
        policy: Policy | type[Policy] | str = "fcfs",
        knobs: Config | None = None,
        *,
        executor: Executor | None = None,
        groups: Sequence[CacheGroup] = ALL,
        **limits: int,
    ) -> None:
        defaults = {"num_blocks": 64, "block_size": 4, "max_model_len": 128, "max_num_seqs": 8}
        values = defaults | {"max_num_batched_tokens": 64} | limits
        self.config = SchedulerConfig(cache_groups=tuple(groups), **values)  # type: ignore[arg-type]
        if not isinstance(policy, Policy):
            kind = find_policy(policy) if isinstance(policy, str) else policy
            policy = kind(self.config, knobs or kind.Knobs())
        self.scheduler = Scheduler(self.config, policy)
        self._order, policy.order = policy.order, self._note_order  # type: ignore[method-assign]
        self._paused: set[Request] = set()  # requests that the policy left out of its order
        self.num_pauses = 0
        self.executor = FakeExecutor(self.config.block_size, choose or hashed(50), draft, groups)
        self.now = 0.0
        self.engine = EngineCore(self.scheduler, executor or self.executor, lambda: self.now)
        self.token_ids: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        self.finish_reasons: dict[str, FinishReason] = {}
        self.errors: dict[str, str] = {}
        self.first_news: dict[str, RequestOutput] = {}

    def add(self, request_id: str, prompt: list[int], max_tokens: int = 4, **others: object) -> Request:
        names = SchedulingParams.__dataclass_fields__.keys() & others.keys()
        scheduling = SchedulingParams(**{name: others.pop(name) for name in names})  # type: ignore[arg-type]  # any field
        request = Request(request_id, prompt, params(max_tokens, **others), self.now, scheduling=scheduling)
        self.scheduler.add(request)
        self.token_ids[request_id] = []
        return request

    def step(self) -> list[RequestOutput]:
        num_calls = len(self.executor.steps)
        self._paused.clear()
        running = {request: request.num_preemptions for request in self.scheduler.running.values()}
        news = self.engine.step()
        self.now += 1
        for output in news:
            self.take(output)
        check_invariants(self.scheduler)
        for shares in self.executor.steps[num_calls:]:
            assert sum(share.num_tokens for share in shares) <= self.config.max_num_batched_tokens
            assert all(share.num_tokens <= self.config.max_chunk_tokens for share in shares)
            assert len(shares) <= self.config.max_num_seqs
            assert len({share.request_id for share in shares}) == len(shares)
        for shares in self.executor.steps[num_calls : num_calls + 1]:
            served = {share.request_id for share in shares}
            unserved = [request for request in running if request.request_id not in served]
            kept = [request for request in unserved if request.num_preemptions == running[request]]
            assert self._paused.issuperset(kept), "a running request stood still"
            self.num_pauses += len(kept)
            assert not kept or served - self.scheduler.padding.keys(), "all stood still"
        return news

    def _note_order(self, running: Collection[Request], waiting: Collection[Request], now: float) -> Iterator[Request]:
        self._paused.update(running)
        for request in self._order(running, waiting, now):
            self._paused.discard(request)
            yield request

    def take(self, output: RequestOutput | None) -> None:
        """Take delivery of a request's news."""
        assert output is not None
        request_id = output.request_id
        assert request_id not in self.finish_reasons, "news after the end"
        self.first_news.setdefault(request_id, output)
        self.token_ids[request_id] += output.token_ids
        self.logprobs.setdefault(request_id, []).extend(output.logprobs or [])
        self.prompt_logprobs.setdefault(request_id, []).extend(output.prompt_logprobs or [])
        assert (output.error is not None) == (output.finish_reason in (FinishReason.ERROR, FinishReason.INVALID))
        if output.finish_reason:
            self.finish_reasons[request_id] = output.finish_reason
        if output.error:
            assert "Injected" in output.error, output.error
            self.errors[request_id] = output.error

    def abort(self, request_id: str) -> None:
        self.take(self.scheduler.abort(request_id))

    def drain(self, max_steps: int = 1000) -> None:
        """Step until nothing is left; then every request was answered and every block is free."""
        for _ in range(max_steps):
            if not self.scheduler.num_unfinished:
                break
            self.step()
        self.step()  # lets the executor forget the last ones
        assert self.finish_reasons.keys() == self.token_ids.keys(), "a request was not answered to the end"
        assert self.free_blocks == self.config.num_blocks
        assert self.scheduler.kv_cache.num_promised == 0
        assert not self.executor.sequences, "the executor still holds requests"

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache.pool.num_available

    def status(self, request: Request) -> RequestStatus:
        """The status as it is now; a call, so that a type checker does not carry an earlier answer over a step."""
        return request.status

    @property
    def chunks(self) -> list[list[tuple[str, int, int]]]:
        """(request id, start, num_tokens) of all shares, step by step; calls that only release are left out."""
        return [[share[:3] for share in shares] for shares in self.executor.steps if shares]
