"""Writes receipts of answers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import msgspec

from shoal.model.checkpoint.find import resolve_checkpoint
from shoal.receipts import Receipt, ReceiptModel, ReceiptOutput, receipt_sha256, tokens_sha256
from shoal.scheduler.errors import InvalidRequestError, ShoalError
from shoal.scheduler.output import SamplingParams
from shoal.server.fingerprint import content_sha256, fingerprint, numeric_settings
from shoal.server.settings import Settings

# Parameters of sampling that a server or its checkpoint may give, where a request does not.
_RESOLVED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@dataclass(frozen=True)
class Answered:
    """What there is to tell of an answer.

    Attributes:
        endpoint: that answered.
        body: as it was sent.
        instead: fields that stand in the receipt in place of those of the body.
        params: of each prompt.
        prompts, outputs: token ids, of each prompt and each choice.
    """

    endpoint: str
    body: bytes
    instead: Mapping[str, Any]
    params: Sequence[SamplingParams]
    prompts: list[list[int]]
    outputs: list[list[int]]


class Receipts:
    """Writes receipts.  The first one has the whole checkpoint read, in a thread of its own.

    Args:
        name: of the model.
        fingerprint: of the checkpoint that was loaded.
    """

    def __init__(self, settings: Settings, name: str, fingerprint: str) -> None:
        self._settings = settings
        self._name = name
        self._fingerprint = fingerprint
        self._content: Future[str | None] | None = None

    async def write(self, answered: Answered) -> Receipt:
        """The receipt of an answer.

        Raises:
            InvalidRequestError: the body cannot be given back.
        """
        if self._content is None:
            self._content = Future()
            threading.Thread(target=self._hash, args=(self._content,), name="shoal-receipts", daemon=True).start()
        content = await asyncio.shield(asyncio.wrap_future(self._content))
        model = ReceiptModel(self._name, self._fingerprint, content, numeric_settings(self._settings))
        return await asyncio.to_thread(_write, answered, model)

    def _hash(self, found: Future[str | None]) -> None:
        """Hash what was loaded, if it is still there."""
        content = None
        try:
            checkpoint = resolve_checkpoint(self._settings.model)
            content = content_sha256(checkpoint)
            if fingerprint(checkpoint, self._settings) != self._fingerprint:
                content = None
        except (OSError, ShoalError):
            pass
        finally:
            found.set_result(content)


def _write(answered: Answered, model: ReceiptModel) -> Receipt:
    try:
        request: dict[str, Any] = msgspec.json.decode(answered.body)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequestError(f"receipt: the body cannot be given back: {error}", param="receipt") from error
    sampling = {name: getattr(answered.params[0], name) for name in _RESOLVED}
    receipt = Receipt(
        server=version("shoal"),
        endpoint=answered.endpoint,
        model=model,
        request=request | dict(answered.instead),
        sampling=sampling | {"max_tokens": max(one.max_tokens for one in answered.params)},
        prompts=answered.prompts,
        outputs=[ReceiptOutput(len(one), tokens_sha256(one), one) for one in answered.outputs],
    )
    told = json.loads(msgspec.json.encode(receipt))
    return msgspec.structs.replace(receipt, sha256=receipt_sha256(told))
