"""What an answer tells at its end if it is asked: how it was served, and how to have it again."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.generation import Generation
from shoal.server.receipts import Answered
from shoal.server.service import Service
from shoal.server.wire.requests import ChatBody, CompletionBody
from shoal.server.wire.responses import Timing, Told

Answer = TypeVar("Answer", bound=Told)

TIMING_HEADER = "x-shoal-timing"
_WORDS = {"true": True, "1": True, "false": False, "0": False}


class Extras:
    """What one call asks for.  The header stands for the field of the body.

    Attributes:
        are_asked: whether there is anything to tell.
        instead: fields that a receipt gives back in place of what was sent, where that does not say all.

    Raises:
        InvalidRequestError: the header makes no sense.
    """

    def __init__(self, service: Service, request: Request, body: CompletionBody | ChatBody, endpoint: str) -> None:
        self._service = service
        self._request = request
        self._body = body
        self._endpoint = endpoint
        self.instead: dict[str, Any] = {}
        header = request.headers.get(TIMING_HEADER, "false")
        if header not in _WORDS:
            raise InvalidRequestError(
                f"{TIMING_HEADER}: expected true or false, not {header[:32]!r}", param=TIMING_HEADER
            )
        body.timing = body.timing or _WORDS[header]
        self.are_asked = body.timing or body.receipt

    async def add(self, answer: Answer, generation: Generation) -> Answer:
        """Add what it is to tell to a whole answer, or to the part of a stream's end that has a place for it.

        Raises:
            InvalidRequestError: the body cannot be given back in a receipt.
        """
        journals = [choice.journal for choice in generation.choices]
        if self._body.timing:
            histories = [journal.history for journal in journals]
            answer.timing = Timing([history.explanation() if history else None for history in histories])
        if self._body.receipt:
            firsts = [journal.request for journal in journals[:: self._body.n]]
            answered = Answered(
                self._endpoint,
                await self._request.body(),
                self.instead,
                [first.params for first in firsts],
                [list(first.prompt_token_ids) for first in firsts],
                [choice.journal.output_token_ids[: choice.num_tokens] for choice in generation.choices],
            )
            answer.receipt = await self._service.receipts.write(answered)
        return answer
