"""One API call in the engine: its prompts and choices, and the text that comes of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from math import inf

from shoal.scheduler.errors import InvalidRequestError
from shoal.scheduler.output import TokenLogprobs
from shoal.server.account import Account, usage_of
from shoal.server.choices import engine_requests
from shoal.server.deltas import Deltas
from shoal.server.engine.packing import TokenIds
from shoal.server.service import Service
from shoal.server.sinks import Open, Room
from shoal.server.terms import Terms
from shoal.server.text import Choice, Delta, Scored
from shoal.server.wire.requests import ChatBody, CompletionBody
from shoal.server.wire.responses import Usage


class Generation:
    """The choices of one API call, from submission to the last token.

    Args:
        prompts: text and token ids of each.
        grammar: that the texts keep to; empty for none.
        api_id: id of the API call, from which the ids of the engine's requests are made.
        seed: of the call; see `choice_seed`.
        terms: on which they are served.

    Raises:
        InvalidRequestError, RateLimitError, QueueFullError, EngineUnavailableError: the call is refused.
    """

    def __init__(
        self,
        service: Service,
        body: CompletionBody | ChatBody,
        prompts: Sequence[tuple[str, TokenIds]],
        grammar: str,
        *,
        api_id: str,
        seed: int,
        terms: Terms,
    ) -> None:
        self._engine = service.engine
        self._account = Account(service, body, api_id, terms)
        self._prompts = prompts
        self._constraint = body.dead_end
        requests = engine_requests(service, body, prompts, grammar, api_id=api_id, seed=seed, terms=terms)
        with terms.allowance.taking(requests) as self._settle:
            self._submission = self._engine.submit(requests, terms.timeout)
        echo = isinstance(body, CompletionBody) and body.echo
        self.choices = [
            Choice(
                *(index, journal, service.tokenizer, body.stop_strings),
                scores_text_only=isinstance(body, ChatBody),
                echo=prompts[index // body.n][0] if echo else None,
                shown=service.dialect.shown(body) if body.skip_special_tokens else service.tokenizer.special_ids,
                shows_stop=body.include_stop_str_in_output,
                interval=body.stream_interval if body.stream else 1,
            )
            for index, journal in enumerate(self._submission.journals.values())
        ]
        by_request = dict(zip(self._submission.journals, self.choices, strict=True))
        self.news = Deltas(by_request, self._submission.take)
        self._is_behind = False  # whether the client is: then it gets together what has waited for it

    def prompt_of(self, index: int) -> tuple[list[int], list[TokenLogprobs]]:
        """The tokens of a choice's prompt, and the log-probabilities of all but the first, if they were asked for."""
        journal = self.choices[index].journal
        return list(journal.request.prompt_token_ids), journal.prompt_logprobs

    @property
    def num_choices(self) -> int:
        return len(self.choices)

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        """What is new, as it comes; never an empty list.  Leaving the iteration early aborts what is unfinished.

        A list is so short that answers of it are made within milliseconds, and others have their turn after it.

        Raises:
            InvalidRequestError, EngineError, EngineUnavailableError, RequestTimeoutError: it cannot go on.
        """
        failure: Exception | None = None
        try:
            while not self.news.are_finished:
                await (asyncio.sleep(0) if self.news.has_rest else self._submission.wait())
                if deltas := self._take(coalesces=self._is_behind):
                    yield deltas
        except Exception as error:
            failure = error
            if isinstance(error, InvalidRequestError):
                self._constraint.refuse(error.message)
            raise
        finally:
            self.close(failure)

    def close(self, failure: Exception | None = None) -> None:
        """Abort what is unfinished.  Whoever leaves before the first delta has to; else it is done already."""
        self._submission.on_news = bool  # it is of no use any more, and refers to this object
        self._engine.abort(self._submission.journals)
        if self._submission.timer is not None:
            self._submission.timer.cancel()
        self._settle(self.usage.total_tokens)
        self._account.end([choice.journal for choice in self.choices], failure)

    async def run(self, give: Callable[[list[Delta]], None], sink: Room) -> None:
        """Have `give` put all that is new into a sink, from where the news arrives while the sink is ready.

        Raises as `deltas` does.
        """

        def give_at_once() -> bool:
            if self.news.has_rest or not sink.is_ready:
                return False
            try:
                if deltas := self._take(coalesces=False):
                    give(deltas)
            except Exception as error:
                self._submission.fail(error)
            return not (self.news.has_rest or self.news.are_finished)

        self._submission.on_news = give_at_once
        async with aclosing(self.deltas()) as steps:
            async for deltas in steps:
                give(deltas)
                self._is_behind = sink.coalesces and not sink.is_ready
                await sink.flush()

    async def complete(self, take_scored: Callable[[int, list[Scored]], None] | None = None) -> list[Delta]:
        """All choices in full, in order, but for what `take_scored` is given of a choice.  Raises as `deltas` does."""
        self._submission.max_backlog = inf
        whole = [Delta(index, "") for index in range(self.num_choices)]

        def add(deltas: list[Delta]) -> None:
            for delta in deltas:
                if take_scored is not None:
                    take_scored(delta.index, delta.scored)
                    delta.scored = []
                whole[delta.index].add(delta)

        await self.run(add, Open())
        return whole

    def _take(self, *, coalesces: bool) -> list[Delta]:
        deltas = self.news.take(coalesces=coalesces)
        for delta in deltas:
            if delta.finish_reason:
                journal = self.choices[delta.index].journal
                self._engine.abort([journal.request.request_id])  # a stop string ends the text, not yet the request
                self._account.finish(journal, delta.finish_reason)
        return deltas

    @property
    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once, however many choices it has."""
        return usage_of(self._prompts, self.choices)
