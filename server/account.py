"""What an API call used, and what is told of it when its choices have ended, and it with them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from shoal.server.engine.journal import Journal
from shoal.server.engine.packing import TokenIds
from shoal.server.service import Service
from shoal.server.terms import Terms
from shoal.server.text import Choice
from shoal.server.wire.requests import ChatBody, CompletionBody
from shoal.server.wire.responses import CompletionTokensDetails, PromptTokensDetails, Usage


class Account:
    """Tells the metrics of a call, and the tracer if there is one."""

    def __init__(self, service: Service, body: CompletionBody | ChatBody, api_id: str, terms: Terms) -> None:
        self._metrics = service.metrics
        self._tracer = service.tracer
        self._api_id = api_id
        self._operation = "chat" if isinstance(body, ChatBody) else "text_completion"
        self._n = body.n
        self._context = terms.context

    def finish(self, choice: Journal, reason: str) -> None:
        """A choice has ended."""
        choice.finish_reason = reason
        self._metrics.finished(choice, reason, time.monotonic())

    def end(self, choices: Sequence[Journal], failure: Exception | None) -> None:
        """The call has ended, and with it the choices that had not: with the failure, or because nobody wants them."""
        for choice in choices:
            if choice.finish_reason is None:
                self.finish(choice, "abort" if failure is None else "error")
        prompts = [choices[first : first + self._n] for first in range(0, len(choices), self._n)]
        for prompt in prompts:
            self._metrics.answered(prompt)
        if self._tracer is not None:
            self._tracer.record(self._api_id, self._operation, prompts, self._context, failure)


def usage_of(prompts: Sequence[tuple[str, TokenIds]], choices: Sequence[Choice]) -> Usage:
    """Tokens so far; a prompt counts once, however many choices it has."""
    num_prompt = sum(len(token_ids) for _, token_ids in prompts)
    num_output = sum(choice.num_tokens for choice in choices)
    # The choices of a prompt run together, so that those after the first may find it in the cache: that is no hit.
    num_cached = sum(choice.journal.num_cached_tokens for choice in choices[:: len(choices) // len(prompts)])
    drafted = CompletionTokensDetails(
        accepted_prediction_tokens=sum(choice.journal.num_accepted_tokens for choice in choices),
        rejected_prediction_tokens=sum(choice.journal.num_rejected_tokens for choice in choices),
    )
    return Usage(num_prompt, num_output, num_prompt + num_output, PromptTokensDetails(num_cached), drafted)
