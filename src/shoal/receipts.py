"""A receipt: what a server says of an answer so that it can be had again, token for token.

Whoever writes receipts and whoever reads them share this file.
"""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

from msgspec import Struct

VERSION = 1


class ReceiptModel(Struct, frozen=True):
    """What computed the answer.

    Attributes:
        name: under which the server serves the model.
        fingerprint: `system_fingerprint` of the answer; the settings that change numbers are in it.
        sha256: of the checkpoint's files; None if they were changed after the server had started.
        settings: that change numbers, by name.
    """

    name: str
    fingerprint: str
    sha256: str | None
    settings: dict[str, Any]


class ReceiptOutput(Struct, frozen=True):
    """The tokens of one choice; those that a stop string cut off are among them.

    Attributes:
        sha256: of the token ids, see `tokens_sha256`.
    """

    num_tokens: int
    sha256: str
    token_ids: list[int]


class Receipt(Struct, frozen=True, kw_only=True):
    """The receipt of one answer.

    Attributes:
        version: of this shape.
        server: version of Shoal.
        request: the body as it was sent, with all of its conversation where that referred to a response before.
        sampling: parameters that the server resolved, under their names in a body.
        prompts: the token ids of each prompt.
        outputs: of each choice.
        sha256: of all else here, see `receipt_sha256`.
    """

    version: int = VERSION
    server: str
    endpoint: str
    model: ReceiptModel
    request: dict[str, Any]
    sampling: dict[str, Any]
    prompts: list[list[int]]
    outputs: list[ReceiptOutput]
    sha256: str = ""


def tokens_sha256(token_ids: list[int]) -> str:
    """The SHA-256 of token ids, written in decimal with commas between them."""
    return sha256(",".join(map(str, token_ids)).encode()).hexdigest()


def receipt_sha256(receipt: dict[str, Any]) -> str:
    """The SHA-256 of a receipt, as it was read from JSON: of its JSON without `sha256`, keys sorted, nothing between.

    It tells of a receipt that was changed by mistake; whoever changes it on purpose can change this as well.
    """
    told = {name: value for name, value in receipt.items() if name != "sha256"}
    return sha256(json.dumps(_normal(told), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _normal(value: Any) -> Any:
    """A value whose numbers are written in one way: some programs write 1.0 as 1."""
    match value:
        case dict():
            return {key: _normal(one) for key, one in value.items()}
        case list():
            return [_normal(one) for one in value]
        case float() if value.is_integer():
            return int(value)
    return value
