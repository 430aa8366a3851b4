"""The prompts of requests, as text and tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from shoal.model.text.tokenizer import Tokenizer
from shoal.scheduler.admission import check_request
from shoal.scheduler.errors import ContextLengthError, InvalidRequestError
from shoal.server.engine.engine import Engine
from shoal.server.engine.packing import TokenIds, pack
from shoal.server.rendering import Conversation
from shoal.server.sampling import check_token_ids
from shoal.server.templates import TemplateRenderer
from shoal.server.wire.embeddings import EmbeddingsBody
from shoal.server.wire.requests import ChatBody, CompletionBody, GenerationBody
from shoal.server.work import off_the_loop


class Prompts:
    """Makes tokens of what requests say, and refuses early what no context could hold.

    Args:
        templates: renders the conversations of chats.
        engine: whose limits hold.
    """

    def __init__(self, tokenizer: Tokenizer, templates: TemplateRenderer, engine: Engine, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._templates = templates
        self._engine = engine
        self._vocab_size = vocab_size

    def check_choices(self, num_prompts: int, n: int) -> None:
        """Refuse a call that asks for more choices than the server takes at once, before any work is done for it.

        Raises:
            InvalidRequestError: there is no room for them, however empty the server.
            QueueFullError: there is no room for any one.
        """
        limits = self._engine.ready.limits
        room = limits.max_num_seqs + limits.max_num_waiting
        if num_prompts * n > room:
            raise InvalidRequestError(
                f"{num_prompts} prompts and n = {n} ask for {num_prompts * n} choices, but the server takes at most "
                f"{room} at once (max_num_seqs {limits.max_num_seqs} + max_num_waiting {limits.max_num_waiting})",
                param="n" if num_prompts == 1 else "prompt",
            )
        self._engine.check_room()

    async def of_completion(self, body: CompletionBody) -> list[tuple[str, TokenIds]]:
        """The prompts of a body, of any of the four kinds, as text and tokens.

        Raises:
            InvalidRequestError: a prompt is empty, or a token id outside the vocabulary.
        """
        texts, lists = _texts_or_lists("prompt", body.prompt)
        if body.suffix:
            prompts = await self._around(body, texts, lists)
        else:
            prompts = await (self._encoded(body, texts) if texts else self._decoded(body, lists))
        return [(text, pack(token_ids)) for text, token_ids in prompts]

    async def of_embeddings(self, body: EmbeddingsBody) -> list[TokenIds]:
        """The tokens of each input, or the first of them if the body says how many.

        Raises:
            InvalidRequestError: an input is empty or too long, or a token id outside the vocabulary.
        """
        limits, most = self._engine.ready.limits, body.truncate_prompt_tokens
        if most is not None and most > limits.max_model_len:
            raise InvalidRequestError(
                f"truncate_prompt_tokens: {most} exceeds the {limits.max_model_len} tokens that the context holds",
                param="truncate_prompt_tokens",
            )
        most = limits.max_model_len if most == -1 else most
        texts, lists = _texts_or_lists("input", body.input)
        for index, text in enumerate(texts):
            with _about_input(index, len(texts)):
                self._check_text(text, is_cut=most is not None)
        if texts:
            with _about_input(0, 1):
                lists = await self.encode_all(texts, max_tokens=most)
        for index, token_ids in enumerate(lists):
            with _about_input(index, len(lists)):
                check_request(limits, min(len(token_ids), most or len(token_ids)), 0)
                check_token_ids("prompt", token_ids, self._vocab_size)
        return [pack(token_ids[:most]) for token_ids in lists]

    async def of_chat(self, body: ChatBody, conversation: Conversation) -> tuple[str, TokenIds]:
        """Apply the chat template; the text and its tokens.  See `Tokenizer.encode_chat`.

        Raises:
            InvalidRequestError: the template refuses the messages or takes too much, or they are too long.
        """
        if body.truncate_prompt_tokens is None:
            self._check_chars(conversation.num_chars)
        text, token_ids = await self._templates.encode(conversation, parses_special=body.parse_special)
        if body.add_special_tokens and (begin := self._tokenizer.begin_token_ids) != token_ids[: len(begin)]:
            token_ids = begin + token_ids
        ((text, kept),) = await self._cut(body, [(text, token_ids)])
        return text, pack(kept)

    async def encode_all(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, max_tokens: int | None = None
    ) -> list[list[int]]:
        """The tokens of texts, without holding up others if they are long together.

        Args:
            max_tokens: of which the texts' beginnings are made, special tokens included; None for whole texts.
        """

        def work() -> list[list[int]]:
            if max_tokens is not None:
                return [self._tokenizer.encode_start(text, max_tokens) for text in texts]
            return [self._tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]

        return await off_the_loop(work, *map(len, texts))

    async def decode_all(self, lists: Sequence[list[int]], *, skip_special_tokens: bool = True) -> list[str]:
        """The texts of lists of tokens, without holding up others if they are many."""

        def work() -> list[str]:
            return [self._tokenizer.decode(one, skip_special_tokens=skip_special_tokens) for one in lists]

        return await off_the_loop(work, *map(len, lists))

    def _check_text(self, text: str, *, is_cut: bool = False) -> None:
        """Refuse a prompt that is empty, or too long unless it is to be cut."""
        if not text:
            raise InvalidRequestError("prompt is empty: it must have at least one character", param="prompt")
        if not is_cut:
            self._check_chars(len(text))

    def _check_chars(self, num_chars: int) -> None:
        """Refuse a text that is too long for the context whatever its tokens are, before they are made.

        Raises:
            ContextLengthError: it is.
        """
        limit, least = self._engine.ready.limits.max_model_len, -(-num_chars // self._tokenizer.max_token_chars)
        if least > limit:
            raise ContextLengthError(
                f"prompt has {num_chars} characters, which are {least} tokens or more, but the context holds {limit} "
                f"tokens, prompt and output together",
                param="prompt",
            )

    async def _encoded(self, body: CompletionBody, texts: Sequence[str]) -> list[tuple[str, list[int]]]:
        for text in texts:
            self._check_text(text, is_cut=body.truncate_prompt_tokens is not None)
        lists = await self.encode_all(texts, add_special_tokens=body.add_special_tokens is not False)
        return await self._cut(body, list(zip(texts, lists, strict=True)))

    async def _decoded(self, body: CompletionBody, lists: list[list[int]]) -> list[tuple[str, list[int]]]:
        for token_ids in lists:
            if body.truncate_prompt_tokens is None:
                check_request(self._engine.ready.limits, len(token_ids), 0)
            check_token_ids("prompt", token_ids, self._vocab_size)
        cut = await self._cut(body, [("", token_ids) for token_ids in lists])
        lists = [token_ids for _, token_ids in cut]
        return list(zip(await self.decode_all(lists), lists, strict=True))

    async def _around(
        self, body: CompletionBody, texts: Sequence[str], lists: list[list[int]]
    ) -> list[tuple[str, list[int]]]:
        """Prompts that ask for what stands between each of the given ones and the suffix.

        Raises:
            InvalidRequestError: the model cannot do so.
        """
        middle, suffix = self._tokenizer.middle, body.suffix or ""
        if middle is None:
            raise InvalidRequestError(
                "suffix: the model was not trained to fill in the middle: its vocabulary has no tokens for it",
                param="suffix",
            )
        for text in texts:
            self._check_chars(len(text) + len(suffix))
        for token_ids in lists:
            check_token_ids("prompt", token_ids, self._vocab_size)
        *encoded, after = await self.encode_all([*texts, suffix], add_special_tokens=False)
        begin = [] if body.add_special_tokens is False else self._tokenizer.begin_token_ids
        body.stop_token_ids += sorted(middle.ends)
        made = [begin + middle.prompt(before, after) for before in encoded or lists]
        return list(zip(texts or [""] * len(lists), made, strict=True))

    async def _cut(self, body: GenerationBody, prompts: list[tuple[str, list[int]]]) -> list[tuple[str, list[int]]]:
        """The prompts, of which those that are longer than the request wants them begin later."""
        most = body.truncate_prompt_tokens
        if most is None:
            return prompts
        if most == -1:  # as many as the context leaves
            most = max(1, self._engine.ready.limits.max_model_len - max(1, body.max_tokens or 1))
        lists = [token_ids[-most:] if most else [] for _, token_ids in prompts]
        texts = await self.decode_all(lists)
        return [
            prompt if len(prompt[1]) <= most else (text, token_ids)
            for prompt, text, token_ids in zip(prompts, texts, lists, strict=True)
        ]


def _texts_or_lists(param: str, prompt: Any) -> tuple[list[str], list[list[int]]]:
    """What a field holds: one or several texts, or one or several lists of token ids; the other kind is empty.

    Raises:
        InvalidRequestError: it holds a mixture.
    """
    kinds = set() if isinstance(prompt, str) else set(map(type, prompt))
    match prompt:
        case str(text):
            return [text], []
        case [str(), *_] if len(kinds) == 1:
            return prompt, []
        case [int(), *_] | [] if len(kinds) <= 1:
            return [], [prompt]
        case [list(), *_] if len(kinds) == 1:
            return [], prompt
    raise InvalidRequestError(f"{param}: expected only texts, only token ids, or only lists of token ids", param=param)


@contextmanager
def _about_input(index: int, count: int) -> Iterator[None]:
    """Errors about a prompt are about this input of so many."""
    try:
        yield
    except InvalidRequestError as error:
        name = "input" if count == 1 else f"input[{index}]"
        raise type(error)(error.message.replace("prompt", name, 1), param="input") from error
