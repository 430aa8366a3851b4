"""What both kinds of completion may tell beside the text: usage, tokens, the log-probabilities of the prompt."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import msgspec

from shoal.server.logprobs import prompt_logprobs
from shoal.server.routes.answer import encode, event
from shoal.server.routes.call import Body, Call
from shoal.server.routes.pieces import GAP, HOLE, encode_parts
from shoal.server.text import Delta
from shoal.server.wire.requests import StreamOptions
from shoal.server.wire.responses import Told, Usage

# A field that is left out of the JSON where it is unset.
Unset = msgspec.UnsetType


class OpenAICall(Call[Body]):
    """A call of /v1/completions or /v1/chat/completions.

    Attributes:
        scores_prompt_in_choices: whether the prompt's log-probabilities stand in each choice, or once behind all.
    """

    scores_prompt_in_choices: ClassVar[bool] = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.stream_options = self.body.stream_options or StreamOptions()
        self._tells_more = self.body.return_token_ids or self.stream_options.continuous_usage_stats
        self._around: dict[int, list[bytes]] = {}  # what stands before and after the text, by choice

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return self.generation.usage

    @property
    def usage_in_chunks(self) -> Usage | Unset | None:
        """What a stream's chunks say of usage before the last."""
        if self.stream_options.continuous_usage_stats:
            return self.usage
        return None if self.stream_options.include_usage else msgspec.UNSET

    # -- streams ---------------------------------------------------------------------------------------------------

    def is_plain(self, delta: Delta) -> bool:
        """Whether nothing but the text is new in the event of this delta."""
        return not (self._tells_more or delta.scored or delta.finish_reason)

    def text_event(self, index: int, text: str) -> bytes:
        """An event of a choice in which only the text is new: all else of it is encoded once."""
        if index not in self._around:
            self._around[index] = self.plain_event(index, GAP).split(b"\0")
        before, after = self._around[index]
        return before + encode(text) + after

    @abstractmethod
    def plain_event(self, index: int, text: Any) -> bytes:
        """`text_event`, of a text or of what stands for it."""

    @abstractmethod
    def empty_chunk(self) -> Told:
        """The last chunk, without choices."""

    async def last_events(self) -> list[bytes]:
        if self.stream_options.include_usage or self.extras.are_asked:
            return [event(await self.extras.add(self.empty_chunk(), self.generation))]
        return []

    # -- what is told beside the text ------------------------------------------------------------------------------

    def token_ids(self, delta: Delta) -> list[int] | Unset:
        """What an answer says of a choice's tokens."""
        return delta.token_ids if self.body.return_token_ids else msgspec.UNSET

    def prompt_token_ids(self, index: int) -> list[int] | Unset:
        return self.generation.prompt_of(index)[0] if self.body.return_token_ids else msgspec.UNSET

    @property
    def prompt_hole(self) -> Any:
        """Stands for the prompt's log-probabilities, if they were asked for."""
        return msgspec.UNSET if self.body.prompt_logprobs is None else HOLE

    async def more_entries(self, index: int) -> list[bytearray]:
        is_last = index == self.generation.num_choices - 1
        if self.body.prompt_logprobs is None or not (self.scores_prompt_in_choices or is_last):
            return []
        scored = self.generation.prompt_of(index)
        return [await encode_parts(prompt_logprobs(self.service.tokenizer, *scored, self.body.prompt_logprobs))]
