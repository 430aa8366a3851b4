"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.model.text.tokenizer import Tokenizer
from shoal.scheduler.output import TokenLogprobs
from shoal.server.text import Scored
from shoal.server.wire.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

MIN_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this for a token that cannot occur


def completion_logprobs(tokenizer: Tokenizer, scored: Sequence[Scored]) -> CompletionLogprobs:
    """The shape of /v1/completions: parallel lists."""
    return CompletionLogprobs(
        tokens=[token_text(tokenizer, one.token_id) for one in scored],
        token_logprobs=[_finite(one.logprobs.logprob) if one.logprobs else None for one in scored],
        top_logprobs=[_top(tokenizer, one.logprobs) if one.logprobs else None for one in scored],
        text_offset=[one.text_offset for one in scored],
    )


def chat_logprobs(tokenizer: Tokenizer, scored: Sequence[Scored]) -> ChatLogprobs:
    """The shape of /v1/chat/completions: an object for each token."""
    content = []
    for one in scored:
        if one.logprobs is not None:
            top = zip(one.logprobs.top_token_ids, one.logprobs.top_logprobs, strict=True)
            alternatives = [
                TopLogprob(_plain(data), _finite(logprob), list(data))
                for token_id, logprob in top
                for data in (tokenizer.token_bytes(token_id),)
            ]
            data = tokenizer.token_bytes(one.token_id)
            content.append(TokenLogprob(_plain(data), _finite(one.logprobs.logprob), list(data), alternatives))
    return ChatLogprobs(content)


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The token as text; if its bytes are not text on their own, as `bytes:\\\\xe2\\\\x82`, as OpenAI writes them."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _plain(data: bytes) -> str:
    return data.decode(errors="replace")


def _top(tokenizer: Tokenizer, logprobs: TokenLogprobs) -> dict[str, float]:
    """The most probable alternatives, best first."""
    pairs = zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)
    return {token_text(tokenizer, token_id): _finite(logprob) for token_id, logprob in pairs}


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
