"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from shoal.model.text.tokenizer import Tokenizer
from shoal.scheduler.output import TokenLogprobs
from shoal.server.text import MAX_SCORED, Scored
from shoal.server.wire.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)

MIN_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this for a token that cannot occur


Name = Callable[[Tokenizer, int], str]  # how a token is written


def completion_logprobs(tokenizer: Tokenizer, scored: Sequence[Scored], name: Name) -> CompletionLogprobs:
    """The shape of /v1/completions: parallel lists.  Alternatives have the chosen token beside them."""

    def top(one: Scored) -> dict[str, float] | None:
        if one.logprobs is None:
            return None
        best = _best(one.token_id, one.logprobs)
        return {name(tokenizer, token_id): value for token_id, (value, _) in best.items()}

    return CompletionLogprobs(
        tokens=[name(tokenizer, one.token_id) for one in scored],
        token_logprobs=[_finite(one.logprobs.logprob) if one.logprobs else None for one in scored],
        top_logprobs=[top(one) for one in scored],
        text_offset=[one.text_offset for one in scored],
    )


def prompt_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], scores: Sequence[TokenLogprobs], count: int
) -> Iterator[PromptLogprobs]:
    """vLLM's shape of a prompt, part by part: for each token the best `count` ones and the one that stands there."""
    yield [None]
    for at in range(0, len(scores), MAX_SCORED):
        some = zip(token_ids[1 + at :], scores[at : at + MAX_SCORED], strict=False)
        yield [_prompt_logprob(tokenizer, *one, count) for one in some]


def _prompt_logprob(
    tokenizer: Tokenizer, token_id: int, logprobs: TokenLogprobs, count: int
) -> dict[int, PromptLogprob]:
    return {
        one: PromptLogprob(value, rank, token_text(tokenizer, one))
        for one, (value, rank) in _best(token_id, logprobs, count).items()
    }


def chat_logprobs(tokenizer: Tokenizer, scored: Sequence[Scored], name: Name) -> ChatLogprobs:
    """The shape of /v1/chat/completions: an object for each token."""
    content = []
    for one in scored:
        if one.logprobs is not None:
            top = zip(one.logprobs.top_token_ids, one.logprobs.top_logprobs, strict=True)
            alternatives = [
                TopLogprob(name(tokenizer, token_id), _finite(logprob), list(data))
                for token_id, logprob in top
                for data in (tokenizer.token_bytes(token_id),)
            ]
            data = tokenizer.token_bytes(one.token_id)
            text = name(tokenizer, one.token_id)
            content.append(TokenLogprob(text, _finite(one.logprobs.logprob), list(data), alternatives))
    return ChatLogprobs(content)


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The token as text; if its bytes are not text on their own, as `bytes:\\\\xe2\\\\x82`, as OpenAI writes them."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def plain_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The token as text, with U+FFFD for what is none on its own."""
    return tokenizer.token_bytes(token_id).decode(errors="replace")


def id_text(_: Tokenizer, token_id: int) -> str:
    """The token's id, as vLLM writes it where it is asked to."""
    return f"token_id:{token_id}"


def _best(token_id: int, logprobs: TokenLogprobs, count: int | None = None) -> dict[int, tuple[float, int]]:
    """Log-probability and rank of the first `count` alternatives, or of all, and of the token that stands there."""
    top = zip(logprobs.top_token_ids[:count], logprobs.top_logprobs, strict=False)
    found = {one: (_finite(value), rank) for rank, (one, value) in enumerate(top, 1)}
    found.setdefault(token_id, (_finite(logprobs.logprob), logprobs.rank))
    return found


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
