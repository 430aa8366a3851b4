"""What both kinds of completion may tell beside the text: usage, tokens, the log-probabilities of the prompt."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from shoal.server.logprobs import prompt_logprobs
from shoal.server.routes.call import Body, Call
from shoal.server.routes.pieces import HOLE, encode_parts
from shoal.server.text import Delta
from shoal.server.wire.requests import StreamOptions
from shoal.server.wire.responses import Usage

# A field that is left out of the JSON where it is unset.
Unset = msgspec.UnsetType


class OpenAICall(Call[Body]):
    """A call of /v1/completions or /v1/chat/completions.

    Attributes:
        scores_prompt_in_choices: whether the prompt's log-probabilities stand in each choice, or once behind all.
    """

    scores_prompt_in_choices: ClassVar[bool] = True

    @property
    def stream_options(self) -> StreamOptions:
        return self.body.stream_options or StreamOptions()

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
