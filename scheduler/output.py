"""The plain data that rooms exchange: how to sample, what to run in a step, and its result.

These types carry no behaviour and import nothing, so that the scheduler, the model, the simulator and the wire
(msgspec encodes dataclasses as they are) all speak in the same words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal


class FinishReason(str, Enum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Pooling:
    """How the hidden states of a prompt, after the last norm, become one vector of length 1.

    Attributes:
        method: that of the last token, the mean of all, or that of the first token ("cls").
        num_dimensions: numbers of the vector; those after them are cut off before its length becomes 1.
    """

    method: Literal["last", "mean", "cls"]
    num_dimensions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, with every default resolved.

    Attributes:
        max_tokens: most tokens to generate; 0 computes (and scores) the prompt only.
        min_tokens: `stop_token_ids` cannot be chosen before this many tokens were generated.
        temperature: 0 is greedy.
        top_n_sigma: keep tokens whose logit is at most this many standard deviations below the greatest; 0 keeps all.
        top_k: keep the k most probable tokens; 0 keeps all.
        typical_p: keep the smallest set of tokens of most typical surprise whose probability reaches this; 1 keeps all.
        top_p: keep the smallest set of most probable tokens whose probability reaches this; 1 keeps all.
        min_p: drop tokens less probable than this share of the most probable one; 0 keeps all.
        xtc_probability: with this probability, `xtc_threshold` takes effect at a position; 0 is never.
        xtc_threshold: drop all tokens that are at least so probable but the least probable of them; > 0.5 drops none.
        presence_penalty, frequency_penalty: OpenAI's, over generated tokens.
        repetition_penalty: of Keskar et al. 2019 (CTRL), over prompt and generated tokens; 1 is none.
        logit_bias: added to the logits of these token ids before all else but penalties.
        seed: 64-bit seed of the sampling noise, always set: the server draws one where the request gives none.
        stop_token_ids: generation ends when one of these is chosen (end-of-text included, unless ignored).
        num_logprobs: log-probabilities of the chosen token and this many alternatives are returned; None for none.
        logprob_token_ids: instead of alternatives, these are returned, whatever `num_logprobs` says; None for those.
        num_prompt_logprobs: log-probabilities of every prompt token but the first, and of this many alternatives.
        grammar: that the generated text keeps to, as llguidance takes it; empty for none.
        allowed_token_ids: no others may be chosen; empty for all.
        bad_words: tokens in a row of which the last one may not be chosen after the others.
        pooling: how the prompt becomes a vector; None if it need not.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_n_sigma: float = 0.0
    top_k: int = 0
    typical_p: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int
    stop_token_ids: frozenset[int] = frozenset()
    num_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] | None = None
    num_prompt_logprobs: int | None = None
    grammar: str = ""
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    pooling: Pooling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingParams:
    """What the scheduler may know of a request beside its tokens.  It never changes which tokens are chosen.

    Attributes:
        client: name of the client that asks, for policies that share among clients; empty if it is not known.
        priority: lower goes first.
        ttft_slo_ms: the first token is wanted within this time after arrival; None for the policy's default.
        tpot_slo_ms: each further token is wanted within this time after the one before; None for the policy's default.
        cache_salt: only requests with the same one find each other's prefixes in the cache; none or 16 characters.
    """

    client: str = ""
    priority: int = 0
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural, of the model's own distribution) at one position.

    Attributes:
        logprob: of the token that stands there.
        rank: 1 for the most probable token.
        top_token_ids, top_logprobs: the most probable alternatives, best first, or the tokens that were asked for.
    """

    logprob: float
    rank: int
    top_token_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class NewRequest:
    """What an executor must know of a request that joins the batch, for the first time or after a preemption.

    Attributes:
        token_ids: all tokens known so far, the prompt's and then the generated ones.
        num_prompt_tokens: how many of them are the prompt's.
        speculates: whether tokens may be drafted for it.
        cache_salt: as in `SchedulingParams`.
    """

    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    speculates: bool = True
    cache_salt: str = ""


@dataclass(slots=True)
class ScheduledRequest:
    """One request's share of a step: compute `num_scheduled_tokens` tokens from position `num_computed_tokens` on.

    Attributes:
        row: of the batch; the request keeps it until it leaves the batch.
        new_block_ids: blocks that the request's block table gains; the whole table if `new` is set.
        num_blocks: length of the block table with them.
        samples: whether the share reaches the last known token, so that the next one is to be chosen.
        spec_token_ids: drafted tokens that end the share and are to be verified.
        new: set in the step in which the request joins the batch.
        is_padding: whether the request has ended and its last position is only computed again, in place, as padded
            batches do.  The result is not used.
    """

    request_id: str
    row: int
    num_computed_tokens: int
    num_scheduled_tokens: int
    new_block_ids: list[int]
    num_blocks: int
    samples: bool
    spec_token_ids: list[int]
    new: NewRequest | None
    is_padding: bool = False


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """What to run in the next step.

    Attributes:
        scheduled: the requests of the step, each at most once.
        released: rows whose requests left the batch since the last step (finished, aborted or preempted), so that the
            executor can forget them.  Applied before `scheduled`, in which a row may have a new request already.
        preempted: by the id of each request that gave way in this step, the id of the one that it gave way to: itself,
            if it lacks blocks that nobody has to give.
    """

    scheduled: list[ScheduledRequest]
    released: list[int]
    preempted: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class StepResult:
    """The result of a step; lists are parallel to `SchedulerOutput.scheduled`.

    Attributes:
        token_ids: chosen tokens of each request: none if it does not sample; else the accepted drafted tokens
            and one more.
        spec_token_ids: drafted tokens proposed for each request's next step; empty when nothing is proposed at all.
        logprobs: by request id, one entry for each chosen token.
        prompt_logprobs: by request id, one entry for each prompt token that a token of the share predicts.
        embeddings: by request id, the vectors of prompts that are complete.
        errors: by request id, `ERROR` or `INVALID`, if the request is at fault itself, and why it alone failed; its
            `token_ids` are then ignored.
    """

    token_ids: list[list[int]]
    spec_token_ids: list[list[int]] = field(default_factory=list)
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    embeddings: dict[str, bytes] = field(default_factory=dict)
    errors: dict[str, tuple[FinishReason, str]] = field(default_factory=dict)


@dataclass(slots=True)
class RequestOutput:
    """News of one request after a step.

    Attributes:
        finish_reason: set once, in the last output of the request.
        embedding: the prompt's vector, float32 in little-endian order.
        num_cached_tokens: prompt tokens that were found in the prefix cache at first admission.
        queue_time: seconds from arrival to the first step.
        num_accepted_tokens, num_rejected_tokens: drafted tokens that verification in this step kept, and dropped.
        num_preemptions: how often the request was preempted so far.
        error: the message, if `finish_reason` is `ERROR` or `INVALID`.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    embedding: bytes | None = None
    num_cached_tokens: int = 0
    queue_time: float = 0.0
    num_accepted_tokens: int = 0
    num_rejected_tokens: int = 0
    num_preemptions: int = 0
    error: str | None = None


@dataclass(slots=True)
class SchedulerStats:
    """A snapshot for metrics; counters only grow.

    Attributes:
        kv_cache_usage: share of blocks owned by requests, 0 to 1.
        num_prefix_queries, num_prefix_hits: prompt tokens looked up in, and found in, the prefix cache.
        num_drafts: proposals that were verified.
        num_draft_tokens: their tokens.
        num_accepted_tokens_per_pos: how many of the first, second, ... tokens of proposals were accepted.
        num_deferred: waiting requests that the policy did not admit to the last step, though there may have been room.
        num_steps, num_step_tokens: steps, and the tokens computed in them.  A change of these alone is no news.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    num_preemptions: int
    num_prefix_queries: int
    num_prefix_hits: int
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    num_deferred: int = 0
    num_steps: int = field(default=0, compare=False)
    num_step_tokens: int = field(default=0, compare=False)

    def add_draft(self, num_drafted: int, num_rejected: int) -> None:
        """Count a proposal that was verified."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        per_pos = self.num_accepted_tokens_per_pos
        per_pos += [0] * (num_drafted - len(per_pos))
        for index in range(num_drafted - num_rejected):
            per_pos[index] += 1
