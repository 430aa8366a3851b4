"""POST /v1/embeddings, as OpenAI's API defines it, with the extensions that vLLM's users know."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shoal.scheduler.errors import InvalidRequestError
from shoal.server.wire.body import Body
from shoal.server.wire.requests import MAX_INT, MAX_PRIORITY, MAX_SALT_CHARS, Milliseconds, Seconds, TokenId

MAX_INPUTS = 2048


class EmbeddingsBody(Body, kw_only=True):
    """The request."""

    input: str | list[str | TokenId | list[TokenId]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1, le=MAX_INT)] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=MAX_INT)] | None = None

    # as those of `GenerationBody`
    user: str | None = None
    priority: Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    ttft_slo_ms: Milliseconds | None = None
    tpot_slo_ms: Milliseconds | None = None
    timeout: Seconds | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=MAX_SALT_CHARS)] | None = None

    def check(self) -> None:
        is_list = isinstance(self.input, list) and not all(isinstance(one, int) for one in self.input)
        if is_list and len(self.input) > MAX_INPUTS:
            raise InvalidRequestError(f"input: {len(self.input)} inputs, but at most {MAX_INPUTS}", param="input")
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequestError(
                "truncate_prompt_tokens: expected at least 1, or -1 for as many as the context holds",
                param="truncate_prompt_tokens",
            )


class Embedding(msgspec.Struct):
    """The vector of one input: numbers, or little-endian float32 in base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingsUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct):
    """The answer, vectors in the order of the inputs."""

    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
    object: Literal["list"] = "list"
