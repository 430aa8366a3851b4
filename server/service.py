"""What every route needs, made once at the start and handed to them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.model.checkpoint.config import GenerationDefaults
from shoal.model.record import ModelConfig
from shoal.model.text.tokenizer import Tokenizer
from shoal.scheduler.admission import check_request
from shoal.scheduler.errors import ContextLengthError, InvalidRequestError
from shoal.server.batches.sharing import SharedEngine
from shoal.server.batches.store import Batches
from shoal.server.constraints import Constraints
from shoal.server.errors import ModelNotFoundError
from shoal.server.limits import Allowance
from shoal.server.metrics import Metrics
from shoal.server.rendering import Conversation
from shoal.server.sampling import check_token_ids
from shoal.server.settings import Settings
from shoal.server.streams import StreamStore
from shoal.server.templates import TemplateRenderer
from shoal.server.tools.dialect import Dialect
from shoal.server.wire.requests import CompletionBody
from shoal.server.work import off_the_loop


@dataclass(frozen=True)
class Service:
    """The model as the API sees it, and the engine that runs it."""

    settings: Settings
    api_keys: tuple[str, ...]
    allowances: Mapping[str | None, Allowance]  # see `make_allowances`
    model_name: str
    config: ModelConfig
    defaults: GenerationDefaults
    tokenizer: Tokenizer
    constraints: Constraints
    templates: TemplateRenderer
    dialect: Dialect
    engine: SharedEngine
    metrics: Metrics
    batches: Batches
    started: int
    streams: StreamStore

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            ModelNotFoundError: this server does not serve it.
        """
        if name is not None and name != self.model_name:
            raise ModelNotFoundError(
                f"the model {name!r} does not exist: this server serves {self.model_name!r}", param="model"
            )

    def check_choices(self, num_prompts: int, n: int) -> None:
        """Refuse a call that asks for more choices than the server takes at once, before any work is done for it.

        Raises:
            InvalidRequestError: there is no room for them, however empty the server.
            QueueFullError: there is no room for any one.
        """
        limits = self.engine.ready.limits
        room = limits.max_num_seqs + limits.max_num_waiting
        if num_prompts * n > room:
            raise InvalidRequestError(
                f"{num_prompts} prompts and n = {n} ask for {num_prompts * n} choices, but the server takes at most "
                f"{room} at once (max_num_seqs {limits.max_num_seqs} + max_num_waiting {limits.max_num_waiting})",
                param="n" if num_prompts == 1 else "prompt",
            )
        self.engine.check_room()

    def check_speculation(self, wanted: str | None) -> bool:
        """Whether tokens may be drafted for a request that asks for this method, or for none in particular.

        Raises:
            InvalidRequestError: the server has another one.
        """
        method = self.settings.speculation.method
        if wanted not in (None, "off", method):
            raise InvalidRequestError(
                f"speculation {wanted!r} is not what this server was started with ({method!r}): leave it out, or say "
                f"'off' to do without",
                param="speculation",
            )
        return wanted != "off" and method != "off"

    async def encode_all(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """The tokens of texts, without holding up others if they are long together."""

        def work() -> list[list[int]]:
            return [self.tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]

        return await off_the_loop(work, *map(len, texts))

    async def decode_all(self, lists: Sequence[list[int]], *, skip_special_tokens: bool = True) -> list[str]:
        """The texts of lists of tokens, without holding up others if they are many."""

        def work() -> list[str]:
            return [self.tokenizer.decode(one, skip_special_tokens=skip_special_tokens) for one in lists]

        return await off_the_loop(work, *map(len, lists))

    def check_chars(self, num_chars: int) -> None:
        """Refuse a text that is too long for the context whatever its tokens are, before they are made.

        Raises:
            ContextLengthError: it is.
        """
        limit, least = self.engine.ready.limits.max_model_len, -(-num_chars // self.tokenizer.max_token_chars)
        if least > limit:
            raise ContextLengthError(
                f"prompt has {num_chars} characters, which are {least} tokens or more, but the context holds {limit} "
                f"tokens, prompt and output together",
                param="prompt",
            )

    async def encode_chat(self, conversation: Conversation, *, parses_special: bool = False) -> tuple[str, list[int]]:
        """Apply the chat template; the text and its tokens.  See `Tokenizer.encode_chat`.

        Raises:
            InvalidRequestError: the template refuses the messages or takes too much, or they are too long.
        """
        self.check_chars(conversation.num_chars)
        return await self.templates.encode(conversation, parses_special=parses_special)

    async def completion_prompts(self, body: CompletionBody) -> list[tuple[str, list[int]]]:
        """The prompts of a body, of any of the four kinds, as text and tokens.

        Raises:
            InvalidRequestError: a prompt is empty, or a token id outside the vocabulary.
        """
        prompt: Any = body.prompt
        kinds = set() if isinstance(prompt, str) else set(map(type, prompt))
        match prompt:
            case str(text):
                return await self._encoded([text])
            case [str(), *_] if len(kinds) == 1:
                return await self._encoded(prompt)
            case [int(), *_] | [] if len(kinds) <= 1:
                return await self._decoded([prompt])
            case [list(), *_] if len(kinds) == 1:
                return await self._decoded(prompt)
        raise InvalidRequestError(
            "prompt: expected only texts, only token ids, or only lists of token ids", param="prompt"
        )

    async def _encoded(self, texts: Sequence[str]) -> list[tuple[str, list[int]]]:
        if not all(texts):
            raise InvalidRequestError("prompt is empty: it must have at least one character", param="prompt")
        for text in texts:
            self.check_chars(len(text))
        return list(zip(texts, await self.encode_all(texts), strict=True))

    async def _decoded(self, lists: list[list[int]]) -> list[tuple[str, list[int]]]:
        for token_ids in lists:
            check_request(self.engine.ready.limits, len(token_ids), 0)
            check_token_ids("prompt", token_ids, self.config.vocab_size)
        return list(zip(await self.decode_all(lists), lists, strict=True))


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def unix_time() -> int:
    return int(time.time())
