"""What is refused at the door: requests that can never be served, and more of them than may wait."""

from __future__ import annotations

from shoal.scheduler.config import SchedulerConfig
from shoal.scheduler.errors import ContextLengthError, InvalidRequestError, QueueFullError


def check_request(config: SchedulerConfig, num_prompt_tokens: int, max_tokens: int) -> None:
    """Refuse a request that could never be served, however empty the server.

    Raises:
        InvalidRequestError: the prompt is empty.
        ContextLengthError: it exceeds `max_model_len` or the whole KV cache.
    """
    if num_prompt_tokens == 0:
        raise InvalidRequestError("prompt is empty: it must have at least one token", param="prompt")
    if num_prompt_tokens > config.max_model_len or (num_prompt_tokens == config.max_model_len and max_tokens > 0):
        raise ContextLengthError(
            f"prompt has {num_prompt_tokens} tokens, but the context holds {config.max_model_len} tokens, "
            "prompt and output together",
            param="prompt",
        )
    if num_prompt_tokens + max_tokens > config.max_model_len:
        raise ContextLengthError(
            f"max_tokens is {max_tokens} and the prompt has {num_prompt_tokens} tokens, but the context holds "
            f"{config.max_model_len} tokens together: max_tokens can be at most "
            f"{config.max_model_len - num_prompt_tokens}",
            param="max_tokens",
        )
    # The last token that is chosen is never computed, so it needs no slot.
    if config.most_blocks(num_prompt_tokens + max(max_tokens - 1, 0)) > config.num_blocks:
        capacity = config.capacity
        raise ContextLengthError(
            f"prompt ({num_prompt_tokens} tokens) and max_tokens ({max_tokens}) need more than the whole KV cache, "
            f"which holds {capacity} tokens ({config.num_blocks} blocks of {config.block_size})",
            param="prompt" if num_prompt_tokens > capacity else "max_tokens",
        )


def check_queue(config: SchedulerConfig, num_unfinished: int, num_new: int = 1) -> None:
    """Refuse requests that would make the bounded queue overflow.

    Raises:
        QueueFullError: `num_unfinished` and `num_new` together exceed `max_num_seqs + max_num_waiting`.
    """
    limit = config.max_num_seqs + config.max_num_waiting
    if num_unfinished + num_new > limit:
        raise QueueFullError(
            f"the server is full: {num_unfinished} requests are unfinished and at most {limit} may be "
            f"(max_num_seqs {config.max_num_seqs} + max_num_waiting {config.max_num_waiting}); try again later",
            param="max_num_waiting",
        )
