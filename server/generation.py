"""One API call in the engine: its prompts and choices, and the text that comes of them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Literal

from shoal.model.text.tokenizer import IncrementalDetokenizer, Tokenizer
from shoal.scheduler.output import FinishReason, RequestOutput, SamplingParams, SchedulingParams, TokenLogprobs
from shoal.server.engine.engine import Engine
from shoal.server.engine.journal import Journal
from shoal.server.engine.messages import EngineRequest
from shoal.server.metrics import Metrics
from shoal.server.text import StopStrings
from shoal.server.wire.responses import CompletionTokensDetails, PromptTokensDetails, Usage

NUM_CONTEXT_TOKENS = 8  # of the prompt, before which a token's text depends on nothing


@dataclass(slots=True)
class Scored:
    """A token, the place of its text in the choice's text, and its log-probabilities; a prompt's first has none."""

    token_id: int
    text_offset: int
    logprobs: TokenLogprobs | None


@dataclass(slots=True)
class Delta:
    """What is new in one choice.

    Attributes:
        token_ids: the new output tokens; what a stop string cut off is among them.
        scored: the new tokens, prompt tokens before the others; filled if log-probabilities were asked for.
    """

    index: int
    text: str
    token_ids: list[int] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None


class Choice:
    """Turns the tokens of one request into text, up to the first stop string.

    Args:
        echo: the prompt's text, if it is to stand before the rest.
    """

    def __init__(
        self, index: int, journal: Journal, tokenizer: Tokenizer, stop_strings: Sequence[str], echo: str | None
    ) -> None:
        self.index = index
        self.journal = journal
        self.num_tokens = 0
        self.is_finished = False
        self._tokenizer = tokenizer
        self._stop_strings = StopStrings(stop_strings)
        self._echo = echo
        self._num_chars = 0
        self._num_given = 0
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        # Some tokenizers write a token otherwise at the start of a text than in the middle of it.
        self._detokenizer.push(journal.request.prompt_token_ids[-NUM_CONTEXT_TOKENS:])

    def feed(self, output: RequestOutput) -> Delta:
        """The text of a piece of news.  After a stop string the choice is finished, whatever the engine still does."""
        delta = Delta(self.index, "")
        if self._echo is not None and (output.token_ids or output.finish_reason):
            self._echo_prompt(delta, self._echo)
        for position, token_id in enumerate(output.token_ids):
            self.num_tokens += 1
            if output.logprobs:
                delta.scored.append(Scored(token_id, self._num_chars, output.logprobs[position]))
            if output.finish_reason is FinishReason.STOP and position == len(output.token_ids) - 1:
                break  # the stop token itself is not part of the text
            if self._append(delta, self._detokenizer.push([token_id])):
                return self._finish(delta, "stop")
        if output.finish_reason is None:
            return delta
        if self._append(delta, self._detokenizer.flush()):
            return self._finish(delta, "stop")
        delta.text += self._stop_strings.flush()
        return self._finish(delta, "stop" if output.finish_reason is FinishReason.STOP else "length")

    def take_token_ids(self) -> list[int]:
        """The output tokens that were fed since the last call."""
        begin, self._num_given = self._num_given, self.num_tokens
        return self.journal.output_token_ids[begin : self.num_tokens]

    def _append(self, delta: Delta, text: str) -> bool:
        """Add what is certain of the text; whether a stop string ends it."""
        certain, is_stopped = self._stop_strings.push(text)
        delta.text += certain
        self._num_chars += len(text)
        return is_stopped

    def _finish(self, delta: Delta, reason: Literal["stop", "length"]) -> Delta:
        self.is_finished = True
        delta.finish_reason = reason
        return delta

    def _echo_prompt(self, delta: Delta, prompt: str) -> None:
        self._echo = None
        delta.text = prompt
        self._num_chars = len(prompt)
        if self.journal.request.params.num_prompt_logprobs is not None:
            detokenizer, offset = IncrementalDetokenizer(self._tokenizer), 0
            logprobs = [None, *self.journal.prompt_logprobs]
            for token_id, entry in zip(self.journal.request.prompt_token_ids, logprobs, strict=True):
                delta.scored.append(Scored(token_id, offset, entry))
                offset += len(detokenizer.push([token_id]))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, as text and as tokens; `params` lack only the seed of each choice."""

    text: str
    token_ids: list[int]
    params: SamplingParams


class Generation:
    """The choices of one API call, from submission to the last token.

    Args:
        api_id: id of the API call, from which the ids of the engine's requests are made.
        n: choices for each prompt.  Choice i of a prompt samples with seed + i.
        scheduling: what the policy may know of them all.
        speculates: whether tokens may be drafted for them.
        end_after: the output token with which each choice ends, if that is not left to the model.
        echo: whether a choice's text begins with its prompt's.

    Raises:
        InvalidRequestError, QueueFullError, EngineUnavailableError: the engine refuses the call.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        api_id: str,
        prompts: Sequence[Prompt],
        n: int,
        scheduling: SchedulingParams,
        speculates: bool,
        stop_strings: Sequence[str],
        end_after: int | None = None,
        echo: bool = False,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._prompts = prompts
        requests = [
            EngineRequest(
                f"{api_id}-{index}-{i}",
                prompt.token_ids,
                replace(prompt.params, seed=(prompt.params.seed + i) % 2**64),
                scheduling=scheduling,
                speculates=speculates,
                end_after=end_after,
            )
            for index, prompt in enumerate(prompts)
            for i in range(n)
        ]
        self._submission = engine.submit(requests)
        self._choices = {
            request_id: Choice(index, journal, tokenizer, stop_strings, prompts[index // n].text if echo else None)
            for index, (request_id, journal) in enumerate(self._submission.journals.items())
        }

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        """What is new, as it comes; never an empty list.  Leaving the iteration early aborts what is unfinished.

        Raises:
            EngineError, EngineUnavailableError: the generation cannot go on.
        """
        reason = "abort"
        try:
            while not all(choice.is_finished for choice in self._choices.values()):
                deltas = [delta for output in await self._submission.get() for delta in self._feed(output)]
                if deltas:
                    yield deltas
        except Exception:
            reason = "error"
            raise
        finally:
            self._engine.abort(self._choices)
            for choice in self._choices.values():
                if not choice.is_finished:
                    self._metrics.finished(choice.journal, reason, time.monotonic())

    async def complete(self) -> list[Delta]:
        """All choices in full, in order.  Raises as `deltas` does."""
        whole = [Delta(index, "") for index in range(self.num_choices)]
        async with aclosing(self.deltas()) as steps:
            async for deltas in steps:
                for delta in deltas:
                    whole[delta.index].text += delta.text
                    whole[delta.index].token_ids += delta.token_ids
                    whole[delta.index].scored += delta.scored
                    whole[delta.index].finish_reason = delta.finish_reason
        return whole

    def _feed(self, output: RequestOutput) -> list[Delta]:
        choice = self._choices[output.request_id]
        if choice.is_finished:
            return []
        delta = choice.feed(output)
        if delta.finish_reason:
            self._engine.abort([output.request_id])  # a stop string ends the text, but not yet the request
            self._metrics.finished(choice.journal, delta.finish_reason, time.monotonic())
        if not (delta.text or delta.scored or delta.finish_reason):
            return []
        delta.token_ids = choice.take_token_ids()
        return [delta]

    @property
    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once, however many choices it has."""
        num_prompt = sum(len(prompt.token_ids) for prompt in self._prompts)
        num_output = sum(choice.num_tokens for choice in self._choices.values())
        # The choices of a prompt run together, so that those after the first may find it in the cache: that is no hit.
        per_prompt = len(self._choices) // len(self._prompts)
        num_cached = sum(choice.journal.num_cached_tokens for choice in list(self._choices.values())[::per_prompt])
        drafted = CompletionTokensDetails(
            accepted_prediction_tokens=sum(choice.journal.num_accepted_tokens for choice in self._choices.values()),
            rejected_prediction_tokens=sum(choice.journal.num_rejected_tokens for choice in self._choices.values()),
        )
        return Usage(num_prompt, num_output, num_prompt + num_output, PromptTokensDetails(num_cached), drafted)
