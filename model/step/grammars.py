"""Constrained decoding: the texts of some requests keep to grammars, to some tokens, or to what is not forbidden.

Each request with a grammar has a matcher, which has read the tokens that were generated and says which may come next.
A step's masks are computed by another thread while the backend computes the step.  They are a field of
sampling like any other, so that a text does not depend on whether its tokens were drafted, or in which engine.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from shoal.model.speculation.speculation import Speculation
from shoal.model.step.batch import Backend, ForwardBatch, SamplerOutput, SamplingBatch
from shoal.model.step.layout import StepLayout
from shoal.model.step.masks import Masks
from shoal.model.text.grammar import GrammarCompiler, fault
from shoal.scheduler.errors import InvalidRequestError
from shoal.scheduler.output import FinishReason, NewRequest, SamplingParams, ScheduledRequest, StepResult

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

UInt32 = NDArray[np.uint32]

MAX_COMPILED_CHARS = 1_048_576  # of grammars that are kept; compiled they take some times as much memory
MAX_FORCED = 32  # tokens that are proposed for one request at once


@dataclass(slots=True)
class _Constraint:
    """What decides which tokens a request may choose.

    Attributes:
        matcher: of its grammar.
        output: the tokens that were generated.
        allowed: the mask of its allowed tokens.
        is_stuck: whether no token may follow somewhere in this step.
    """

    matcher: LLMatcher | None
    params: SamplingParams
    output: list[int]
    allowed: UInt32
    is_stuck: bool = False

    def reads(self, token_ids: list[int]) -> bool:
        """Take in what was chosen; returns whether the grammar allows it."""
        self.output += token_ids
        return self.matcher is None or _allows(self.matcher, token_ids)

    def may_follow(self, mask: UInt32, drafted: list[int]) -> None:
        """Take from a mask what may not follow the generated tokens and these drafted ones."""
        params, num_output = self.params, len(self.output) + len(drafted)
        mask &= self.allowed
        longest = max(map(len, params.bad_words), default=0)
        recent = [*self.output[-longest:], *drafted] if longest else []
        _take(mask, [last for *before, last in params.bad_words if not before or recent[-len(before) :] == before])
        if params.grammar and num_output < params.min_tokens:
            without = mask.copy()
            _take(without, params.stop_token_ids)
            if without.any():  # else the text can only end: `min_tokens` gives way
                mask[:] = without
        self.is_stuck = self.is_stuck or not mask.any()


class Grammars:
    """The constrained requests in the batch, and the drafts that theirs are joined with.  Implements `Drafts`.

    Args:
        compiler: of the model's tokens.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._any = _mask(range(compiler.vocab_size), compiler.vocab_size)
        self._compiling = ThreadPoolExecutor(1, "shoal-grammars")
        self._masking = ThreadPoolExecutor(1, "shoal-masks")
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._num_chars = 0
        self._rows: dict[int, _Constraint] = {}
        self._others: Speculation | None = None

    def beside(self, others: Speculation | None) -> Self:
        """Take these drafts along, for all requests."""
        self._others = others
        return self

    def prepare_any(self) -> None:
        """Make in advance, in a thread, what every grammar needs."""
        self._compiling.submit(self._compiler.prepare)

    def prepare(self, grammar: str) -> Future[LLMatcher]:
        """Compile a grammar in a thread, unless that was done lately.

        The future's exception is an InvalidRequestError where the grammar cannot be used.
        """
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compiled[grammar] = self._compiling.submit(self._compiler.compile, grammar)
            self._num_chars += len(grammar)
            while self._num_chars > MAX_COMPILED_CHARS and len(self._compiled) > 1:
                self._num_chars -= len(self._compiled.popitem(last=False)[0])
        self._compiled.move_to_end(grammar)
        return compiled

    # -- a step ----------------------------------------------------------------------------------------------------

    def place(self, share: ScheduledRequest) -> None:
        if share.new:
            self._rows.pop(share.row, None)
            params = share.new.params
            if params.grammar or params.allowed_token_ids or params.bad_words:
                self._rows[share.row] = self._join(share.new)
        if self._others is not None:
            self._others.place(share)

    def leave(self, row: int) -> None:
        if self._others is not None:
            self._others.leave(row)

    def execute(
        self,
        backend: Backend,
        batch: ForwardBatch,
        sampling: SamplingBatch,
        scheduled: list[ScheduledRequest],
        layout: StepLayout,
    ) -> SamplerOutput:
        if self._rows:
            sampling = self._masked(sampling, scheduled, layout)
        if self._others is not None:
            return self._others.execute(backend, batch, sampling, scheduled, layout)
        return backend.execute(batch, sampling)

    def propose(self, scheduled: list[ScheduledRequest], result: StepResult) -> list[list[int]]:
        """Tokens that must follow are drafts that cost nothing; of the other drafts what a grammar allows remains."""
        forced = self._read(scheduled, result) if self._rows else {}
        if self._others is None:
            return [forced.get(share.row, []) for share in scheduled] if forced else []
        drafts = self._others.propose(scheduled, result, forced)
        if drafts and self._rows and not self._others.by_rejection:  # which rejects them itself
            return [self._cut(share.row, drafted) for share, drafted in zip(scheduled, drafts, strict=True)]
        return drafts

    # -- the parts -------------------------------------------------------------------------------------------------

    @cached_property
    def _executor(self) -> LLExecutor:
        from llguidance import LLExecutor  # noqa: PLC0415 (see `shoal.model.text.grammar`)

        return LLExecutor(num_threads=max(1, (os.cpu_count() or 1) // 4))

    def _join(self, new: NewRequest) -> _Constraint:
        params, output = new.params, new.token_ids[new.num_prompt_tokens :]
        matcher = self.prepare(params.grammar).result().deep_copy() if params.grammar else None
        if matcher is not None and not _allows(matcher, output):
            raise InvalidRequestError(f"its grammar does not allow what was generated: {fault(matcher)}")
        token_ids = params.allowed_token_ids
        allowed = _mask(token_ids, self._compiler.vocab_size) if token_ids else self._any
        return _Constraint(matcher, params, output, allowed)

    def _masked(self, sampling: SamplingBatch, scheduled: list[ScheduledRequest], layout: StepLayout) -> SamplingBatch:
        """Begin to compute what may be chosen at the rows of logits of constrained requests."""
        numbers = np.full(len(sampling.rows), -1, np.int32)
        jobs: list[tuple[_Constraint, int, list[int]]] = []
        num_masks = end = 0
        for share, num_logits in zip(scheduled, layout.num_logits, strict=True):
            end += num_logits
            constraint = self._rows.get(share.row)
            if constraint is not None and share.samples and not share.is_padding:
                count = len(share.spec_token_ids) + 1
                numbers[end - count : end] = range(num_masks, num_masks + count)
                jobs.append((constraint, num_masks, share.spec_token_ids))
                num_masks += count
        if not jobs:
            return sampling
        rows = sampling.rows.copy()
        rows["mask"] = numbers
        bits = np.repeat(self._any[None], num_masks, axis=0)
        return replace(sampling, rows=rows, masks=Masks(bits, self._masking.submit(self._fill, bits, jobs).result))

    def _fill(self, bits: UInt32, jobs: list[tuple[_Constraint, int, list[int]]]) -> None:
        place = bits.ctypes.data, bits.shape[1] * 4, len(bits)
        with_grammars = [(one.matcher, at, drafted) for one, at, drafted in jobs if one.matcher is not None]
        if alone := [(matcher, at) for matcher, at, drafted in with_grammars if not drafted]:
            self._executor.unsafe_compute_mask_ptr(alone, *place)
        if ahead := [job for job in with_grammars if job[2]]:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(ahead, *place)
        for constraint, at, drafted in jobs:
            constraint.is_stuck, params = False, constraint.params
            if params.allowed_token_ids or params.bad_words or len(constraint.output) < params.min_tokens:
                for index in range(len(drafted) + 1):
                    constraint.may_follow(bits[at + index], drafted[:index])

    def _read(self, scheduled: list[ScheduledRequest], result: StepResult) -> dict[int, list[int]]:
        """Have the matchers read what a step has chosen; returns by row what must follow."""
        forced: dict[int, list[int]] = {}
        for share, token_ids in zip(scheduled, result.token_ids, strict=True):
            constraint = self._rows.get(share.row)
            if constraint is None or not token_ids or share.is_padding:
                continue
            has_failed = share.request_id in result.errors
            if constraint.is_stuck if has_failed else not constraint.reads(token_ids):
                result.errors[share.request_id] = FinishReason.INVALID, "no token may follow the text so far"
            elif not has_failed and (follow := self._must_follow(constraint.matcher)):
                forced[share.row] = follow
        return forced

    def _must_follow(self, matcher: LLMatcher | None) -> list[int]:
        return [] if matcher is None else self._without_end(matcher.compute_ff_tokens()[:MAX_FORCED])

    def _cut(self, row: int, drafted: list[int]) -> list[int]:
        """The leading drafted tokens that the grammar of a row allows: others must not cost a row of a step."""
        constraint = self._rows.get(row)
        if constraint is None or constraint.matcher is None or not drafted:
            return drafted
        drafted = self._without_end(drafted)
        return drafted[: constraint.matcher.validate_tokens(drafted)]

    def _without_end(self, token_ids: list[int]) -> list[int]:
        """The tokens before the first that ends a text: nothing follows it that could be verified."""
        ends = [index for index, token_id in enumerate(token_ids) if token_id in self._compiler.eos_token_ids]
        return token_ids[: ends[0]] if ends else token_ids


def _allows(matcher: LLMatcher, token_ids: list[int]) -> bool:
    """Whether a grammar allows tokens, which its matcher reads as far as the end of the text."""
    num_read = matcher.try_consume_tokens(token_ids)
    return not matcher.is_error() and (num_read == len(token_ids) or matcher.is_stopped())


def _mask(token_ids: Iterable[int], vocab_size: int) -> UInt32:
    """[ceil(vocab_size / 32)] the mask of these tokens."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    bits[list(token_ids)] = True
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def _take(mask: UInt32, token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        mask[token_id // 32] &= np.uint32(~(1 << token_id % 32) & 0xFFFFFFFF)
