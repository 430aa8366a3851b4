"""From the parameters of a request body to `SamplingParams`, every default resolved."""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from hashlib import blake2b

from shoal.model.checkpoint.config import GenerationDefaults
from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import InvalidRequestError
from shoal.scheduler.output import SamplingParams
from shoal.server.wire.requests import ChatBody, CompletionBody, GenerationBody

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
_TOKEN_ID = re.compile("[0-9]{1,10}")
# Parameters that a body has under the same names.  A checkpoint's defaults have some of them, too.
_RESOLVED = ("grammar", "allowed_token_ids", "bad_words", "logprob_token_ids")
_BY_NAME = [
    field.name
    for field in fields(SamplingParams)
    if field.name in GenerationBody.__struct_fields__ and field.name not in _RESOLVED
]


def resolve_seed(body: GenerationBody) -> int:
    """The request's seed as an unsigned 64-bit number; drawn if there is none, below 2^53 so that JSON can carry it."""
    return secrets.randbits(53) if body.seed is None else body.seed % 2**64


def choice_seed(seed: int, index: int) -> int:
    """The seed of a choice: the first one has that of the call, the others a hash of it and their index.

    The hash is 64 bits of BLAKE2b over both numbers in 8 bytes each; all three are little-endian.
    """
    if index == 0:
        return seed
    both = seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    return int.from_bytes(blake2b(both, digest_size=8).digest(), "little")


def resolve_sampling(
    body: CompletionBody | ChatBody,
    *,
    seed: int,
    prompt_lens: Iterable[int],
    limits: SchedulerConfig,
    vocab_size: int,
    eos_token_ids: tuple[int, ...],
    defaults: GenerationDefaults,
    grammar: str = "",
    bad_words: Sequence[Sequence[int]] = (),
) -> list[SamplingParams]:
    """Resolve the parameters for prompts of these lengths, in tokens: those of the request, else the checkpoint's
    defaults, else the API's.

    Raises:
        InvalidRequestError: a token id is outside the vocabulary, min_tokens or end_after exceeds max_tokens, or
            something contradicts end_after.
    """
    lengths = [_lengths(body, prompt_len, limits) for prompt_len in prompt_lens]
    if body.end_after is not None:
        _check_end(body, eos_token_ids, grammar)
    if grammar and not eos_token_ids:
        raise InvalidRequestError("a text that keeps to a grammar needs a model with an end-of-text token")
    check_token_ids("stop_token_ids", body.stop_token_ids, vocab_size)
    check_token_ids("allowed_token_ids", body.allowed_token_ids or [], vocab_size)
    ignores_eos = body.ignore_eos and not grammar  # which says where the text may end
    stop_token_ids = frozenset(body.stop_token_ids) | frozenset(() if ignores_eos else eos_token_ids)
    if body.min_tokens and len(stop_token_ids) >= vocab_size:
        raise InvalidRequestError(
            "stop_token_ids: min_tokens leaves no token to choose, for each ends the text", param="stop_token_ids"
        )
    if body.min_tokens and body.allowed_token_ids and stop_token_ids.issuperset(body.allowed_token_ids):
        raise InvalidRequestError(
            "allowed_token_ids: min_tokens leaves no token to choose, for each ends the text", param="allowed_token_ids"
        )
    num_logprobs = _num_logprobs(body)
    scores_prompt = isinstance(body, CompletionBody) and body.echo
    values = {
        name: value
        for source in (defaults, body)
        for name in _BY_NAME
        if (value := getattr(source, name, None)) is not None
    }
    values |= {
        "top_k": max(values.get("top_k", 0), 0),
        "logit_bias": _logit_bias(body.logit_bias or {}, vocab_size),
        "seed": seed,
        "stop_token_ids": stop_token_ids,
        "num_logprobs": num_logprobs,
        "logprob_token_ids": _named_token_ids(body, num_logprobs, vocab_size),
        "num_prompt_logprobs": _most(num_logprobs if scores_prompt else None, body.prompt_logprobs),
        "grammar": grammar,
        "allowed_token_ids": tuple(body.allowed_token_ids or ()),
        "bad_words": tuple(map(tuple, bad_words)),
    }
    return [SamplingParams(**values | length) for length in lengths]


def _lengths(body: CompletionBody | ChatBody, num_prompt_tokens: int, limits: SchedulerConfig) -> dict[str, int]:
    """`max_tokens` and `min_tokens` for one prompt."""
    max_tokens = _max_tokens(body, num_prompt_tokens, limits)
    _check_at_most("min_tokens", body.min_tokens, max_tokens)
    if body.end_after is None:
        return {"max_tokens": max_tokens, "min_tokens": body.min_tokens}
    _check_at_most("end_after", body.end_after, max_tokens)
    # Where the request says where its text ends, the model may not.
    return {"max_tokens": max_tokens, "min_tokens": max_tokens}


def _max_tokens(body: CompletionBody | ChatBody, num_prompt_tokens: int, limits: SchedulerConfig) -> int:
    asked = body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        asked = body.max_completion_tokens
    capacity = limits.capacity + 1  # the last token chosen needs no slot
    room = max(min(limits.max_model_len, capacity) - num_prompt_tokens, 1)
    if asked == -1:
        return room
    if asked is not None:
        return min(asked, room) if asked <= limits.max_model_len else asked
    return room if isinstance(body, ChatBody) else min(COMPLETION_MAX_TOKENS, room)


def _most(*numbers: int | None) -> int | None:
    return max((number for number in numbers if number is not None), default=None)


def _check_at_most(param: str, value: int, max_tokens: int) -> None:
    if value > max_tokens:
        raise InvalidRequestError(
            f"{param} is {value}, but max_tokens is {max_tokens}: it can be at most that", param=param
        )


def _check_end(body: CompletionBody | ChatBody, eos_token_ids: tuple[int, ...], grammar: str) -> None:
    """Refuse what would end a text with `end_after` elsewhere, or tell of an end that the model did not choose."""
    if not eos_token_ids:
        raise InvalidRequestError(
            "end_after needs a model with an end-of-text token, and this one has none", param="end_after"
        )
    contradicting = {
        "stop": body.stop_strings,
        "allowed_token_ids": body.allowed_token_ids,
        "bad_words": body.bad_words,
        "stop_token_ids": body.stop_token_ids,
        "ignore_eos": body.ignore_eos,
        "min_tokens": body.min_tokens,
        "logprobs": _num_logprobs(body) is not None,
        "a grammar": grammar,
    }
    for name, is_set in contradicting.items():
        if is_set:
            raise InvalidRequestError(f"end_after and {name} contradict each other: leave one out", param="end_after")


def _num_logprobs(body: CompletionBody | ChatBody) -> int | None:
    if isinstance(body, CompletionBody):
        return body.logprobs
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _named_token_ids(
    body: CompletionBody | ChatBody, num_logprobs: int | None, vocab_size: int
) -> tuple[int, ...] | None:
    """The tokens that are reported in place of the most probable ones, each once."""
    if body.logprob_token_ids is None:
        return None
    if num_logprobs is None:
        raise InvalidRequestError("logprob_token_ids: needs logprobs to be set", param="logprob_token_ids")
    if body.max_tokens == 0:
        raise InvalidRequestError(
            "logprob_token_ids: are reported of generated tokens, but max_tokens is 0", param="logprob_token_ids"
        )
    check_token_ids("logprob_token_ids", body.logprob_token_ids, vocab_size)
    return tuple(dict.fromkeys(body.logprob_token_ids))


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    resolved: dict[int, float] = {}
    for key, addend in bias.items():
        if not _TOKEN_ID.fullmatch(key):
            raise InvalidRequestError(f"logit_bias: {key[:32]!r} is not a token id", param="logit_bias")
        resolved[int(key)] = addend
    check_token_ids("logit_bias", resolved, vocab_size)
    return resolved


def check_token_ids(param: str, token_ids: Collection[int], vocab_size: int) -> None:
    """Refuse token ids that the model does not know.

    Raises:
        InvalidRequestError: one is outside the vocabulary.
    """
    greatest = max(token_ids, default=-1)
    if greatest >= vocab_size:
        raise InvalidRequestError(
            f"{param}: token id {greatest} is outside the vocabulary of {vocab_size}", param=param
        )
