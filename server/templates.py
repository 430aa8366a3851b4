"""Encodes conversations by the chat template of a checkpoint, rendered in a process that cannot take too much."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from functools import partial

import msgspec
from msgspec.structs import replace

from shoal.model.text.chat_template import texts_in
from shoal.model.text.tokenizer import Tokenizer
from shoal.scheduler.errors import InvalidRequestError
from shoal.server.rendering import MAX_BYTES, MAX_CHARS, SECONDS, Conversation, Rendered, Templates
from shoal.server.work import off_the_loop

_MAX_LINE_BYTES = 8 * MAX_CHARS  # JSON writes a character with 6 bytes at most


class TemplateRenderer:
    """Owns a process of `shoal.server.rendering`, from the first conversation on, and another one when it has ended."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._process: Process | None = None
        self._turn = asyncio.Lock()

    async def encode(self, conversation: Conversation, *, parses_special: bool) -> tuple[str, list[int]]:
        """The text of a conversation and its tokens: see `Tokenizer.encode_chat`.

        Raises:
            InvalidRequestError: see `render`.
        """
        mask = ""
        if not parses_special:
            given = {name: getattr(conversation, name) for name in ("messages", "tools", "variables")}
            num_chars = sum(map(len, texts_in(given)))
            masked, mask = await off_the_loop(partial(self._tokenizer.mask_special, given), num_chars)
            conversation = replace(conversation, **masked)
        text = await self.render(conversation)
        return await off_the_loop(partial(self._tokenizer.encode_rendered, text, mask), len(text))

    async def render(self, conversation: Conversation) -> str:
        """The text of a conversation: see `ChatTemplate.render`.

        Raises:
            InvalidRequestError: the template refuses the messages, or takes too much.
        """
        async with self._turn:
            try:
                line = await self._ask(conversation)
            except BaseException:
                await self.close()
                raise
        if not line:
            raise InvalidRequestError(
                f"the chat template of the model takes more than {SECONDS:g} s, {MAX_BYTES // 2**20} MiB or "
                f"{MAX_CHARS} characters for these messages",
                param="messages",
            )
        rendered = msgspec.json.decode(line, type=Rendered)
        if rendered.refusal is not None:
            raise InvalidRequestError(rendered.refusal, param="messages")
        return rendered.text

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _ask(self, conversation: Conversation) -> bytes:
        """The process's answer; empty if it has ended over it."""
        if self._process is None or self._process.returncode is not None:
            command = (sys.executable, "-P", "-m", "shoal.server.rendering")
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, limit=_MAX_LINE_BYTES
            )
            template = self._tokenizer.chat_template
            self._write(Templates(template.sources, template.variables))
        self._write(conversation)
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            await self.close()
        return line

    def _write(self, value: msgspec.Struct) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(value) + b"\n")
