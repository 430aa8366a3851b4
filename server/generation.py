"""One API call in the engine: its prompts and choices, and the text that comes of them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from shoal.model.text.tokenizer import Tokenizer
from shoal.scheduler.output import RequestOutput, SamplingParams, SchedulingParams
from shoal.server.engine.engine import Engine
from shoal.server.engine.messages import EngineRequest
from shoal.server.metrics import Metrics
from shoal.server.text import Choice, Delta
from shoal.server.wire.responses import CompletionTokensDetails, PromptTokensDetails, Usage


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
